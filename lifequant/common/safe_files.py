"""Reading files that others wrote: only regular files, only up to a size limit, and only inside their folder."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from lifequant.common.errors import UserError

MOST_CLASSES = 100_000  # ImageNet-21k has 21,841; a head of so many outputs, its masks and counts stay below 1 GB


def short(text: object, most: int = 200) -> str:
    """``text``, cut where it is too long to be read in a message."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def open_regular(path: str | Path, most: int) -> BinaryIO:
    """The file, open for reading. Never waits for a FIFO's writer.

    Raises UserError for a folder, a FIFO, a device, and for a file of more than ``most`` bytes; OSError as ``open``.
    """
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(number, "rb", closefd=True) if stat.S_ISREG(os.fstat(number).st_mode) else None
    if file is None:
        os.close(number)
        raise UserError(f"{path}: not a regular file: replace it by one")
    size = os.fstat(number).st_size
    if size > most:
        file.close()
        raise UserError(f"{path}: {size} bytes, more than the {most} that are read of such a file: make it smaller")
    return file


def read_text(path: Path, most: int) -> str:
    """The UTF-8 text of a regular file of at most ``most`` bytes. Raises UserError, UnicodeDecodeError, OSError."""
    with open_regular(path, most) as file:
        return file.read(most).decode("utf-8")


def stats_inside(root: Path, paths: Iterable[str], linked: Iterable[str] = ()) -> list[os.stat_result | None]:
    """The status of each file below ``root``, or None if it is missing. ``root`` itself may be a symbolic link.

    Each folder is resolved only once: a large data set would take seconds more otherwise.
    Raises UserError for a path that a symbolic link leads out of ``root`` and out of the folders ``linked``.
    """
    top, allowed = f"{root}{os.sep}", {os.path.realpath(folder) for folder in (root, *linked)}
    checked: set[str] = set()
    found: list[os.stat_result | None] = []
    for path in paths:
        folder = path.rpartition("/")[0]
        status = None
        try:
            if folder not in checked:
                _check_inside(allowed, top + folder, root, path)
                checked.add(folder)
            status = os.lstat(top + path)
            if stat.S_ISLNK(status.st_mode):
                _check_inside(allowed, top + path, root, path)
                status = os.stat(top + path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise
            status = None
        except ValueError:  # a NUL, or a character that this system's file names can't have
            status = None
        found.append(status if status and stat.S_ISREG(status.st_mode) else None)
    return found


def _check_inside(allowed: set[str], path: str, root: Path, name: str) -> None:
    target = Path(os.path.realpath(path))
    if allowed.isdisjoint(map(str, (target, *target.parents))):
        raise UserError(
            f"{root}: a symbolic link leads {short(name)!r} out of the image root: put the files themselves there, "
            "make the task CSVs again, or name the folder that has the files by --data_dir"
        )


def is_inside(target: str, folder: str) -> bool:
    """Whether ``target`` is ``folder`` or lies in it; both are paths without links."""
    return target == folder or target.startswith(folder.rstrip(os.sep) + os.sep)
