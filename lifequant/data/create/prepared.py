"""A folder of images that is written once: <part>/<class>/<file>, where a part is train, test, webcam/train, ...

A note, .prepared.json, says what the folder should hold. With it an interrupted run goes on, missing or broken files are
written again, and a complete folder is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lifequant.common.errors import UserError, one_line
from lifequant.common.files import checked_name, write_all
from lifequant.common.safe_files import read_text
from lifequant.common.text import say

SPLITS = ("train", "test")
SIZE = 32  # pixels of CIFAR's images, and of what is made as they are
NOTE = ".prepared.json"
_MOST_IMAGES = 10**6  # of a class, as a note may say

Place = tuple[str, str, str]  # part, class, file
Note = dict[str, Any]  # dataset, origin, classes (names), counts ({part: [images of each class]})


@dataclass(frozen=True)
class Contents:
    """What is to be written."""

    origin: str  # where the images come from, in words that tell one source from another
    names: list[str]  # of the classes
    files: dict[Place, int | None]  # bytes of each file; None: a PNG of SIZE x SIZE
    read: Callable[[Sequence[Place]], Iterator[tuple[Place, bytes]]]  # the files' contents, in any order

    def note(self, dataset: str) -> Note:
        label = {name: index for index, name in enumerate(checked_names(self.names))}
        counts: dict[str, list[int]] = {}
        for part, name, _ in self.files:
            counts.setdefault(part, [0] * len(label))[label[name]] += 1
        return {"dataset": dataset, "origin": self.origin, "classes": self.names, "counts": counts}


def write(out: Path, dataset: str, contents: Contents, note: Note | None) -> Note:
    """Write what is missing, and say so. ``note`` is the one in ``out``. Raises UserError if it is about other images."""
    wanted = contents.note(dataset)
    if note and note != wanted:
        raise UserError(
            f"{out} was begun with other images ({note['origin']}, now {contents.origin}): choose another --out"
        )
    todo = missing(out, dataset, contents.files)
    if note and not todo:
        return finish(out, wanted, "complete already, nothing to do")
    write_all({out / NOTE: json.dumps(wanted, indent=1, ensure_ascii=False) + "\n"})
    total = len(contents.files)
    if len(todo) < total:
        print(f"{total - len(todo)} of {total} images are there; going on")
    with tqdm(total=total, initial=total - len(todo), unit=" images", desc="writing", disable=None) as bar:
        for place, content in contents.read(todo):
            write_all({out.joinpath(*place): content})
            bar.update()
    return finish(out, wanted, f"wrote {len(todo)} images")


def finish(out: Path, note: Note, what: str) -> Note:
    """Say what the folder holds."""
    print(f"{one_line(out)}: {what}")
    for part, counts in note["counts"].items():
        each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        say(f"{part}: {sum(counts)} images, {len(counts)} classes, {each} images a class")
    return note


def read_note(out: Path, dataset: str, tops: Sequence[str]) -> Note | None:
    """The note in ``out``, or None. Raises UserError for another data set and for images this program did not write.

    ``tops`` are the folders that would be written.
    """
    try:
        note = json.loads(read_text(out / NOTE, 2**20))
        if note["dataset"] != dataset:
            raise UserError(f"{out} holds {note['dataset']}: choose another --out")
        parts = note["counts"]
        if any(len(numbers) != len(note["classes"]) for numbers in parts.values()) or not note["origin"]:
            raise ValueError
        if not all(isinstance(n, int) and 0 <= n <= _MOST_IMAGES for numbers in parts.values() for n in numbers):
            raise ValueError
        if {part.split("/")[-1] for part in parts} != set(SPLITS):
            raise ValueError
        if not all(isinstance(name, str) for name in note["classes"]):
            raise ValueError
        if len(note["classes"]) > 1000:
            raise ValueError
        checked_names(note["classes"])  # they name folders
        return note
    except FileNotFoundError:
        if any((out / top).exists() for top in tops):
            raise UserError(f"{out} holds images that this program did not write: choose another --out") from None
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{out / NOTE} is damaged: delete {out}, or choose another --out") from None


def numbered(names: Sequence[str], counts: dict[str, list[int]]) -> dict[Place, None]:
    """The places of images that are numbered, 0001.png, ..., in each class of each part."""
    return {
        (part, name, f"{number:04d}.png"): None
        for part, numbers in counts.items()
        for name, n in zip(names, numbers, strict=True)
        for number in range(1, n + 1)
    }


def missing(out: Path, dataset: str, files: dict[Place, int | None]) -> list[Place]:
    """The files that ``out`` lacks, or has in another size. Raises UserError for a file that was not written here."""
    classes: dict[str, dict[str, set[str]]] = {}
    for part, name, file in files:
        classes.setdefault(part, {}).setdefault(name, set()).add(file)
    for part, of_class in classes.items():
        there = [path for path in (out / part).iterdir() if path.is_dir()] if (out / part).is_dir() else []
        for folder in sorted(there):
            if folder.name not in of_class:
                raise UserError(f"{folder}: no such class in {dataset}: move it, or change --out")
            strangers = {path.name for path in folder.iterdir()} - of_class[folder.name]
            if extra := sorted(file for file in strangers if not file.startswith(".")):
                n = len(of_class[folder.name])
                raise UserError(f"{folder / extra[0]} is none of this class's {n}: move it, or choose another --out")
    return [place for place, size in files.items() if not _is_whole(out.joinpath(*place), size)]


def _is_whole(path: Path, size: int | None) -> bool:
    if size is None:
        return is_whole_png(path)
    return path.is_file() and path.stat().st_size == size


def is_whole_png(path: Path) -> bool:
    """Whether ``path`` is a 32x32 PNG from its header to its end mark."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + 2 * SIZE.to_bytes(4, "big")
    return content.startswith(header) and content.endswith(b"\x00\x00\x00\x00IEND\xaeB\x60\x82")


def checked_names(names: list[str]) -> list[str]:
    """Class names as folder names; an archive from elsewhere may hold anything."""
    where = Path("the archive's class names")
    for name in names:
        if checked_name(name, where).startswith(".") or "\\" in name or names.count(name) > 1:
            raise UserError(f"{where}: {name!r} can't name a folder of its own")
    return names
