"""Checkpoints are written in the background: training waits for a copy of the state, and not for the disk."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lifequant.checkpointing import checkpoint


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU that training does not change. Tensors that share memory still do, so that the file is the same."""
    copies = {id(t): t.detach().to("cpu", copy=True) for t in tensors(state) if t.device.type != "cpu"}
    return copy.deepcopy(state, copies)


class Writer:
    """Writes checkpoints in one thread, in the order in which they are given, at most one at a time.

    Each file is written whole or not at all, as by checkpoint.write. An error in the thread (a full disk) is raised by the
    next ``write`` or ``wait``. As a context it waits at the end, also after an exception.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def write(self, state: dict[str, Any], *paths: Path) -> None:
        """Write the state as it is now to each of ``paths``. It waits only for the write before."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(snapshot(state), paths), name="checkpoint")
        self.thread.start()  # not a daemon: an interpreter that exits waits for it

    def wait(self) -> None:
        """Wait until everything is on disk. Raises what went wrong in the thread."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _write(self, state: dict[str, Any], paths: tuple[Path, ...]) -> None:
        try:
            content = checkpoint.content(state)
            for path in paths:
                previous = path.with_name(checkpoint.PREVIOUS) if path.name == checkpoint.LAST else None
                checkpoint.write_bytes(path, content, previous)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            self.wait()
        except BaseException:
            if kind is None:  # else the first error is the one to tell
                raise
