"""Finding folders, checking names, writing files whole or not at all, and locking a file for one process."""

from __future__ import annotations

import contextlib
import os
import platform
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from lifequant.common.errors import UserError, one_line
from lifequant.common.safe_files import open_regular

_PARENT = Path(__file__).resolve().parents[2]
TOP = _PARENT if (_PARENT / "pyproject.toml").is_file() else None  # top of the clone; None in an installed wheel


def candidates(folder: str) -> list[Path]:
    """The paths that may be meant by ``folder``: in the working folder, then in the clone, each with and without src/."""
    given = Path(folder).expanduser()
    if given.is_absolute():
        return [given]
    parts = given.parts
    other = Path(*parts[1:]) if parts[:1] == ("src",) else Path("src", *parts)
    bases = [Path.cwd()] + ([TOP] if TOP else [])
    return list(dict.fromkeys(base / relative for base in bases for relative in (given, other)))


def find_folder(folder: str, flag: str, remedy: str) -> Path:
    """The first of ``candidates(folder)`` that exists, resolved. Raises UserError that names them all and the ``remedy``."""
    tried = candidates(folder)
    for path in tried:
        if path.is_dir():
            found = path.resolve()
            if not any("\ud800" <= c <= "\udfff" for c in str(found)):
                return found
            raise UserError(
                f"{flag} {found}: this path is not UTF-8, so no dataset.json could name it; rename the folder"
            )
    raise UserError(f"{flag} {folder}: no such folder (tried {', '.join(map(str, tried))}); {remedy}")


def checked_name(name: str, folder: Path) -> str:
    """Return ``name``, of a class or an image in ``folder``. Raises UserError if a CSV or a terminal can't show it."""
    bad = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)  # Cs: bytes that aren't UTF-8
    if bad or name in ("", ".", "..") or "/" in name:
        raise UserError(f"{folder}: the name '{one_line(name)}' is not plain UTF-8 text: rename it")
    return name


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a loss of power. Does nothing on systems that can't sync a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_all(files: Mapping[Path, str | bytes]) -> None:
    """Write all files to temporary ones, then rename these in order.

    An error before the renames (a full disk) leaves every file as it was.
    """
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary[path].open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
        for folder in {path.parent for path in files}:
            sync_folder(folder)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def lock(path: Path, busy: Callable[[str], None]) -> Iterator[str]:
    """Hold the lock file ``path``. The system lifts the lock when the process dies.

    Where another process holds it, ``busy(owner)`` is called once: it raises, or returns to wait. Yields the former owner
    if it died with the lock, else "". The owner is named in a file beside ``path``, since Windows lets nobody read a locked
    file. Both files are removed at the end. Raises OSError where the folder can't be written.
    """
    held, note = FileLock(path), path.with_name(f"{path.name}.owner")
    try:
        held.acquire(timeout=0)
    except Timeout:
        busy(_read_owner(note) or "another process")
        held.acquire()
    try:
        former = _read_owner(note)
        note.write_text(f"process {os.getpid()} on {platform.node()}")
        yield former
    finally:
        note.unlink(missing_ok=True)
        with contextlib.suppress(PermissionError):  # Windows: it is open
            path.unlink(missing_ok=True)  # a process that waits for this file sees that it is gone and makes another
        held.release()


def _read_owner(note: Path) -> str:
    try:
        with open_regular(note, 1000) as file:
            return one_line(file.read().decode("utf-8", "replace"))
    except (OSError, UserError):
        return ""
