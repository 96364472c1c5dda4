"""Where a run's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Clock:
    """Seconds of a run in all, and of its steps; the first step of each task (a compilation, perhaps) is not timed."""

    def __init__(self, history: dict[str, Any]) -> None:
        self.history, self.mark, self.last = history, time.perf_counter(), None
        self.checkpoint = self.mark

    def begin_task(self) -> None:
        self.last = None

    def step(self, images: int) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.history["timed_seconds"] += now - self.last
            self.history["timed_images"] += images
        self.last = now

    def stop(self) -> None:
        """Add the time since the last call to the run's seconds."""
        now = time.perf_counter()
        self.history["seconds"] += now - self.mark
        self.mark = self.checkpoint = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the seconds inside to that part of the run."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            parts = self.history["seconds_by_part"]
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - begin

    def since_checkpoint(self) -> float:
        return time.perf_counter() - self.checkpoint

    def images_per_second(self) -> float | None:
        return self.history["timed_images"] / self.history["timed_seconds"] if self.history["timed_seconds"] else None
