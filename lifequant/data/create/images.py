"""Image folders from CIFAR-10, CIFAR-100 or scikit-learn's digits: train/<class>/0001.png and test/<class>/0001.png.

Images of a class are numbered in the archive's order. A note, .prepared.json, says what the folder should hold. With it an
interrupted run goes on, missing or broken files are written again, and a complete folder is left alone.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lifequant.common.arguments import Parser, int_at_least
from lifequant.common.errors import UserError, one_line
from lifequant.common.files import checked_name, write_all
from lifequant.common.safe_files import read_text
from lifequant.data.create.cifar import read_cifar
from lifequant.data.split import lowest, share_of_each

DATASETS = ("cifar10", "cifar100", "digits")
SPLITS = ("train", "test")
SIZE = 32
NOTE = ".prepared.json"
DOWNLOAD = ".download"
_MOST_IMAGES = 10**6  # of a class, as a note may say


@dataclass(frozen=True)
class ImageSet:
    """Class names, and for train and test the uint8 images (N, 32, 32, 3) with their labels (N,)."""

    origin: str  # where they come from, in words that tell one source from another
    names: list[str]
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    def counts(self) -> dict[str, list[int]]:
        """Images of each class in train and test."""
        return {s: np.bincount(self.labels[s], minlength=len(self.names)).tolist() for s in SPLITS}


def main_prepare(argv: Sequence[str]) -> int:
    """prepare_images.py. Raises UserError."""
    parser = Parser(description="Write train/<class>/0001.png and test/<class>/0001.png.")
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="what to write")
    parser.add_argument("--out", required=True, help="folder for train/ and test/")
    parser.add_argument("--source", help="CIFAR without a network: cifar-10-python.tar.gz, or a folder that has it")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of the choice of the digits' test images")
    args = parser.parse_args(argv)
    if args.dataset == "digits" and args.source is not None:
        raise UserError("--source: digits come with scikit-learn; leave --source out")
    out = Path(args.out).expanduser()

    note = _read_note(out, args.dataset)
    if note and not args.source and args.dataset != "digits" and not missing(out, note):
        return _finish(out, note, "complete already, nothing to do")
    if args.dataset == "digits":
        found = digits(args.seed)
    else:
        source = Path(args.source).expanduser() if args.source else None
        found = ImageSet(*read_cifar(args.dataset, source, out / DOWNLOAD))
    wanted = {
        "dataset": args.dataset,
        "origin": found.origin,
        "classes": _checked(found.names),
        "counts": found.counts(),
    }
    if note and note != wanted:
        raise UserError(
            f"{out} was begun with other images ({note['origin']}, now {found.origin}): choose another --out"
        )
    todo = missing(out, wanted)
    if note and not todo:
        return _finish(out, wanted, "complete already, nothing to do")
    write_all({out / NOTE: json.dumps(wanted, indent=1, ensure_ascii=False) + "\n"})
    total = sum(map(sum, wanted["counts"].values()))
    if len(todo) < total:
        print(f"{total - len(todo)} of {total} images are there; going on")
    _write(out, found, todo, total)
    return _finish(out, wanted, f"wrote {len(todo)} images")


def _read_note(out: Path, dataset: str) -> dict | None:
    """The note in ``out``, or None. Raises UserError for another data set and for images this program did not write."""
    try:
        note = json.loads(read_text(out / NOTE, 2**20))
        if note["dataset"] != dataset:
            raise UserError(f"{out} holds {note['dataset']}: choose another --out")
        if any(len(note["counts"][split]) != len(note["classes"]) for split in SPLITS) or not note["origin"]:
            raise ValueError
        if not all(isinstance(n, int) and 0 <= n <= _MOST_IMAGES for split in SPLITS for n in note["counts"][split]):
            raise ValueError
        if not all(isinstance(name, str) for name in note["classes"]):
            raise ValueError
        if len(note["classes"]) > 1000:
            raise ValueError
        _checked(note["classes"])  # they name folders
        return note
    except FileNotFoundError:
        if any((out / split).exists() for split in SPLITS):
            raise UserError(f"{out} holds images that this program did not write: choose another --out") from None
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{out / NOTE} is damaged: delete {out}, or choose another --out") from None


def missing(out: Path, note: dict) -> list[tuple[str, int, int]]:
    """(split, label, number) of each image that ``out`` lacks as a whole 32x32 PNG. Raises UserError for a file it did not write."""
    todo = []
    for split in SPLITS:
        folders = {path.name for path in (out / split).iterdir() if path.is_dir()} if (out / split).is_dir() else set()
        stranger = sorted(folders - set(note["classes"]))
        if stranger:
            raise UserError(
                f"{out / split / stranger[0]}: no such class in {note['dataset']}: move it, or change --out"
            )
        for label, (name, n) in enumerate(zip(note["classes"], note["counts"][split], strict=True)):
            folder = out / split / name
            numbers = {f"{number:04d}.png": number for number in range(1, n + 1)}
            present = {path.name for path in folder.iterdir()} if name in folders else set()
            extra = sorted(file for file in present - set(numbers) if not file.startswith("."))
            if extra:
                raise UserError(f"{folder / extra[0]} is none of this class's {n}: move it, or choose another --out")
            todo += [(split, label, number) for file, number in numbers.items() if not is_whole_png(folder / file)]
    return todo


def is_whole_png(path: Path) -> bool:
    """Whether ``path`` is a 32x32 PNG from its header to its end mark."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + 2 * SIZE.to_bytes(4, "big")
    return content.startswith(header) and content.endswith(b"\x00\x00\x00\x00IEND\xaeB\x60\x82")


def _write(out: Path, found: ImageSet, todo: list[tuple[str, int, int]], total: int) -> None:
    indices = {
        split: [np.flatnonzero(found.labels[split] == label) for label in range(len(found.names))] for split in SPLITS
    }
    with tqdm(total=total, initial=total - len(todo), unit=" images", desc="writing", disable=None) as bar:
        for split, label, number in todo:
            png = io.BytesIO()
            Image.fromarray(found.images[split][indices[split][label][number - 1]]).save(png, "PNG")
            write_all({out / split / found.names[label] / f"{number:04d}.png": png.getvalue()})
            bar.update()


def _finish(out: Path, note: dict, what: str) -> int:
    if (out / DOWNLOAD).is_dir():  # the archive, needed no more
        shutil.rmtree(out / DOWNLOAD)
    print(f"{one_line(out)}: {what}")
    for split in SPLITS:
        counts = note["counts"][split]
        each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        print(f"{split}: {sum(counts)} images, {len(counts)} classes, {each} images a class")
    return 0


def _checked(names: list[str]) -> list[str]:
    """Class names as folder names; an archive from elsewhere may hold anything."""
    where = Path("the archive's class names")
    for name in names:
        if checked_name(name, where).startswith(".") or "\\" in name or names.count(name) > 1:
            raise UserError(f"{where}: {name!r} can't name a folder of its own")
    return names


def digits(seed: int) -> ImageSet:
    """scikit-learn's 1,797 digits, 8x8 gray enlarged to 32x32 RGB; 20 % of each class to test, chosen by the seed."""
    try:
        from sklearn.datasets import load_digits  # scikit-learn is optional
    except ImportError:
        raise UserError("the digits come with scikit-learn, which is missing: pip install lifequant[demo]") from None
    data = load_digits()
    gray = np.round(data.images * (255 / 16)).astype(np.uint8)  # levels 0 to 16
    images = np.stack(
        [
            np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB"))
            for image in gray
        ]
    )
    labels = data.target.astype(np.int64)
    names = [f"{index:04d}" for index in range(len(labels))]
    keep = share_of_each(dict(enumerate(np.bincount(labels).tolist())), 0.2)
    test = np.zeros(len(labels), dtype=bool)
    test[lowest(names, labels.tolist(), keep, seed, "digits_test")] = True
    return ImageSet(
        f"scikit-learn, seed {seed}",
        [str(digit) for digit in range(10)],
        {"train": images[~test], "test": images[test]},
        {"train": labels[~test], "test": labels[test]},
    )
