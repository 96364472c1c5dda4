"""One process builds a file, others that want the same one wait for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .cli import one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def building(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of ``path``; wait for a process that has it, which is said once. One that dies lets go of it.

    The lock is a file beside ``path``, there as long as somebody builds. Where the file system has no locks, nobody
    waits. Raises OSError where the folder can't be written.
    """
    lock = path.with_name(f"{path.name}.lock")
    number = _held(lock, say)
    try:
        os.ftruncate(number, 0)
        os.write(number, f"{os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if fcntl is not None:  # while it is still held: the next one sees that its file is gone, and makes another
            lock.unlink(missing_ok=True)
        os.close(number)


def _held(lock: Path, say: Callable[[str], None]) -> int:
    """The open lock file, this process's now."""
    has_said = False
    while True:
        number = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is None:
                return number
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not has_said:
                    owner = one_line(os.pread(number, 100, 0).decode("utf-8", "replace")) or "another"
                    say(f"waiting for process {owner} to finish decoding")
                    has_said = True
                fcntl.flock(number, fcntl.LOCK_EX)
            except OSError:  # no locks on this file system
                return number
            if _is_same(number, lock):
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)  # its holder has removed it


def _is_same(number: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.stat(lock, follow_symlinks=False))
    except FileNotFoundError:
        return False
