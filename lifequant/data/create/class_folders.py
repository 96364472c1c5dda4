"""The images in class folders: every file that a run can read is taken, and every other one is counted with the reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from lifequant.common.errors import UserError, one_line
from lifequant.common.files import checked_name
from lifequant.common.safe_files import is_inside
from lifequant.data.same_images import ImageFiles
from lifequant.data.task_csv import Rows, leaves_root

# A file with another name's end is looked into.
EXTENSIONS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
              ".tif", ".tiff", ".gif")  # fmt: skip
BESIDE, BELOW, HIDDEN, BROKEN, OTHER, TWICE, ODD = (
    "beside the class folders",
    "in folders below a class",
    "with names that begin with a dot",
    "no files, or links that lead nowhere",
    "no images of a known kind",
    "other names of images that are taken",
    "with names that no CSV may have",
)


@dataclass
class Seen:
    """What was found beside the images."""

    left: Counter[str] = field(default_factory=Counter)  # reason: files that are left out
    first: dict[str, str] = field(default_factory=dict)  # reason: one of them
    linked: set[str] = field(default_factory=set)  # folders outside the image root that links lead to

    def leave(self, reason: str, path: str, count: int = 1) -> None:
        """Count files that are left out."""
        if count:
            self.left[reason] += count
            self.first.setdefault(reason, path)

    def notes(self, root: Path) -> list[str]:
        """A line on what is left out, and one on links that lead out of ``root``."""
        found = []
        if self.left:
            parts = [f"{count} {reason} ({one_line(self.first[reason])})" for reason, count in self.left.items()]
            found.append(f"{self.left.total()} files are left out: {', '.join(parts)}")
        if self.linked:
            one = one_line(min(self.linked))
            found.append(
                f"links lead out of {one_line(root)}, to {one}{' and other folders' * (len(self.linked) > 1)}: runs may read there"
            )
        return found

    def outside(self) -> list[str]:
        """The folders outside the image root, those in others of them left out."""
        kept: list[str] = []
        for folder in sorted(self.linked):
            if not any(is_inside(folder, other) for other in kept[-1:]):
                kept.append(folder)
        return kept


def folders_in(folder: Path) -> list[str]:
    """The sorted names of the folders in ``folder``, hidden ones apart."""
    names = (entry.name for entry in os.scandir(folder) if os.path.isdir(entry.path))  # a link in a circle is none
    return sorted(name for name in names if not name.startswith("."))


def class_names(folder: Path) -> list[str]:
    """The sorted names of the class folders in ``folder``, hidden ones apart. Raises UserError where there are none."""
    names = [checked_name(name, folder) for name in folders_in(folder)]
    if not names:
        raise UserError(f"{folder}: no class folders; expected is one folder a class, with its images")
    return names


def class_images(root: Path, folder: Path, names: list[str], seen: Seen | None = None) -> Rows:
    """(path relative to ``root``, label) of every image, by class, then name; ``seen`` takes what else is there.

    Raises UserError for an empty class, and for an image that is in two classes.
    """
    seen = Seen() if seen is None else seen
    files, inside = ImageFiles(root), os.path.realpath(root)
    for entry in os.scandir(folder):
        if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and os.path.isfile(entry.path):
            seen.leave(BESIDE, f"{folder.relative_to(root).as_posix()}/{entry.name}")
    rows: Rows = []
    taken: dict[Hashable, tuple[str, int]] = {}
    for label, name in enumerate(names):
        start, before, own = (folder / name).relative_to(root).as_posix(), len(rows), Seen()
        if not is_inside(files.real(start), inside):
            seen.linked.add(files.real(start))
        for entry in sorted(os.scandir(folder / name), key=lambda entry: entry.name):
            path = f"{start}/{entry.name}"
            if reason := _left_out(entry, path):
                own.leave(reason, path, _files_below(entry) if reason == BELOW else 1)
                continue
            checked_name(entry.name, folder / name)
            other, its_label = taken.setdefault(files.key(path), (path, label))
            if its_label != label:
                raise UserError(f"{root}: {path} is the same image as {other}, of another class: leave one of them out")
            if other != path:
                own.leave(TWICE, path)
                continue
            if entry.is_symlink() and not is_inside(target := os.path.realpath(entry.path), inside):
                seen.linked.add(os.path.dirname(target))
            rows.append((path, label))
        if len(rows) == before:
            why = "".join(f"; {note}" for note in own.notes(root))
            raise UserError(f"{folder / name}: no images in this class folder ({', '.join(EXTENSIONS)}){why}")
        for reason, count in own.left.items():
            seen.leave(reason, own.first[reason], count)
    return rows


def _left_out(entry: os.DirEntry, path: str) -> str:
    """Why this is no image, or an empty text."""
    if entry.name.startswith("."):
        return HIDDEN
    if os.path.isdir(entry.path):
        return BELOW
    if not os.path.isfile(entry.path):
        return BROKEN
    if not entry.name.lower().endswith(EXTENSIONS):
        from lifequant.data.decode import is_image  # which needs torch

        if not is_image(Path(entry.path)):
            return OTHER
    return ODD if leaves_root(path) else ""


def _files_below(entry: os.DirEntry) -> int:
    return sum(len(files) for _, _, files in os.walk(entry.path))


def refuse_shared(root: Path, rows: Rows, other: Path, names: list[str]) -> None:
    """Raises UserError for an image of ``rows`` that is in a class folder of ``other`` too, by a link."""
    files = ImageFiles(root)
    start = other.relative_to(root).as_posix()
    theirs = {
        files.key(path): path
        for path in (f"{start}/{name}/{entry.name}" for name in names for entry in os.scandir(other / name))
    }
    theirs.pop(None, None)
    for image, _ in rows:
        if twin := theirs.get(files.key(image)):
            raise UserError(
                f"{root}: {image} is the same image as {twin}: an image is for training or for testing, not for both"
            )
