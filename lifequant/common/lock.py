"""Lock files: one process at a time, until it lets go or dies, however."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lifequant.common.errors import one_line

try:
    import fcntl
except ImportError:  # Windows: nobody waits
    fcntl = None


@contextmanager
def held(path: Path, busy: Callable[[str], None], dead: Callable[[str], None] = lambda owner: None) -> Iterator[None]:
    """Hold the lock file ``path``, which says whose it is and is there as long as somebody holds it.

    ``busy(owner)`` is called once where another process has it: it raises, or returns to wait. ``dead(owner)`` is told
    whose it was where its owner died. The lock is the system's (flock), which lifts it with the process; where the file
    system has none, nobody waits. Raises OSError where the folder can't be written.
    """
    number, sure = _locked(path, busy)
    try:
        if sure and (former := _owner(number)):
            dead(former)
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
        os.write(number, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: the next one sees that its file is gone, and makes another
        os.close(number)


def _owner(number: int) -> str:
    os.lseek(number, 0, os.SEEK_SET)
    return one_line(os.read(number, 100).decode("utf-8", "replace"))


def _locked(path: Path, busy: Callable[[str], None]) -> tuple[int, bool]:
    """The open lock file, and whether it is this process's alone; False where there are no locks."""
    told = False
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is None:
                return number, False
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    busy(_owner(number) or "another process")
                    told = True
                fcntl.flock(number, fcntl.LOCK_EX)
            except OSError:  # no locks on this file system
                return number, False
            if _is_same(number, path):
                return number, True
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # its holder has removed it


def _is_same(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
