"""The folder of decoded images: where it is, what is in it, and how to clear it (``lifequant cache``)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from lifequant.common.arguments import Parser
from lifequant.common.errors import one_line
from lifequant.common.files import lock

# A cache file, its lock, or what a build that was killed has left.
_NAME = re.compile(r"(?P<file>(?P<name>.+)-[0-9a-f]{24}\.npy)(\.part|\.lock|\.lock\.owner)?")


def default_cache_dir() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lifequant"


def cache_dir_of(given: str | None) -> Path:
    """The folder of ``--cache_dir``, else the user's cache folder."""
    return Path(given).expanduser() if given else default_cache_dir()


@dataclass(frozen=True)
class CacheFile:
    """The decoded images of one data set's training or test images, at one size; or the sizes of images that stay encoded."""

    path: Path
    name: str  # like cifar100-train
    shape: (
        tuple[int, ...] | None
    )  # images, 3, side, side, or images, 2; None where a file is damaged or has not been finished
    size: int  # bytes
    used: date  # when a run last opened it


def cache_files(folder: Path) -> list[CacheFile]:
    """What runs have left in the folder, sorted by name. Files of other programs are left out. Raises OSError."""
    found = {}
    for entry in os.scandir(folder) if folder.is_dir() else ():
        match = _NAME.fullmatch(entry.name)
        if match and entry.is_file(follow_symlinks=False):
            status, path = entry.stat(), folder / match["file"]
            before = found.get(path)
            whole = entry.name == path.name
            shape = _shape(path) if whole else before and before.shape
            used = date.fromtimestamp(max(status.st_atime, status.st_mtime))
            size = status.st_size + (before.size if before else 0)
            found[path] = CacheFile(path, match["name"], shape, size, max(used, before.used) if before else used)
    return sorted(found.values(), key=lambda file: file.path.name)


def _shape(path: Path) -> tuple[int, ...] | None:
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
    except (OSError, ValueError):
        return None
    return shape if len(shape) in (2, 4) else None


def clear(files: Sequence[CacheFile]) -> tuple[list[CacheFile], list[str]]:
    """Remove the files; returns those removed, and a line for each that a run is writing now. Raises OSError."""
    removed, notes = [], []
    for file in files:
        try:
            with lock(file.path.with_name(f"{file.path.name}.lock"), _busy):
                file.path.with_name(f"{file.path.name}.part").unlink(missing_ok=True)
                file.path.unlink(missing_ok=True)
            removed.append(file)
        except _Busy as busy:
            notes.append(f"{file.path.name} is kept: {busy} writes it now")
    return removed, notes


class _Busy(Exception):
    pass


def _busy(owner: str) -> None:
    raise _Busy(owner)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _line(file: CacheFile) -> str:
    match file.shape:
        case (count, _, height, width):
            images = f"{count} images of {height}x{width}"
        case (count, _):
            images = f"sizes of {count} images"
        case _:
            images = "not whole"
    return f"  {one_line(file.name):<20} {images:<26} {megabytes(file.size):>11}  {file.used}"


def main_cache(argv: Sequence[str]) -> int:
    """``lifequant cache``."""
    parser = Parser(description="List the decoded images that runs keep on disk, with the day of their last use.")
    parser.add_argument(
        "--cache_dir", help="the folder that runs had as --cache_dir (default: the user's cache folder)"
    )
    parser.add_argument("--clear", action="store_true", help="remove them; a run that needs them decodes them again")
    args = parser.parse_args(argv)
    folder = cache_dir_of(args.cache_dir)
    files = cache_files(folder)
    notes: list[str] = []
    if args.clear:
        files, notes = clear(files)
    print(
        f"{one_line(folder)}: {'removed ' * args.clear}{len(files)} {'file' if len(files) == 1 else 'files'}, {megabytes(sum(f.size for f in files))}"
    )
    for line in notes if args.clear else map(_line, files):
        print(line)
    return 0
