"""Where a run's time goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BEFORE = ("startup", "compile")  # what time_share leaves out
USEFUL = ("step", "evaluation")  # what is not overhead
KINDS = ("step", "evaluation", "method", "data", "logging", "checkpoint", "other")


class Timer:
    """Seconds of a run in all, of its steps, and of each kind of work.

    It keeps two accounts. ``seconds_by_part`` has the run's large parts, as ``part`` encloses them. ``seconds_by_kind`` gives
    each moment to exactly one kind, the innermost that encloses it:

    - ``startup`` until the first task, ``compile`` for steps in which torch.compile made a graph
    - ``step``: forward, backward, optimizer, the training of a head, BatchNorm's statistics
    - ``evaluation``: test images, held-out images, codes
    - ``method``: importances and whatever else a method does when a task begins or ends
    - ``data``: the order of an epoch, batches, augmentation
    - ``logging``: curves, progress bar, log, results
    - ``checkpoint`` and ``other``

    The time is the host's, and the timer never waits for a device. A GPU works behind the host: a kind has the time in which
    the host queued its kernels, and whoever reads a value waits for all that was queued before. So the loop reads the sums of
    its steps as ``step``.

    Both accounts lie in ``history``, so that they go on after a resumption. ``begin`` is the time.perf_counter() at which the
    run began.
    """

    def __init__(self, history: dict[str, Any], begin: float | None = None) -> None:
        self.history, self.mark, self.last = history, time.perf_counter(), None
        self.checkpoint = self.mark
        self.kinds: dict[str, float] = history.setdefault("seconds_by_kind", {})
        self.failed: str | None = None  # the kind of work that an error ended
        self.kind, self.since = "startup", self.mark if begin is None else begin
        self.graphs = _graphs()

    def begin_task(self) -> None:
        self.last = None

    def step(self, images: int) -> None:
        """Count a step that is done. It counts as ``compile`` if torch has more graphs than before it."""
        if (graphs := _graphs()) != self.graphs:
            self.graphs, self.kind = graphs, "compile"
        now = time.perf_counter()
        if self.last is not None:
            self.history["timed_seconds"] += now - self.last
            self.history["timed_images"] += images
        self.last = now

    def stop(self) -> None:
        """Add the time since the last call to the run's seconds."""
        self.switch(self.kind)
        now = time.perf_counter()
        self.history["seconds"] += now - self.mark
        self.mark = self.checkpoint = now

    def switch(self, kind: str) -> str:
        """Give the time from here on to ``kind``; returns the kind until here. Takes about 0.3 microseconds."""
        now, former = time.perf_counter(), self.kind
        self.kinds[former] = self.kinds.get(former, 0.0) + now - self.since
        self.kind, self.since = kind, now
        return former

    @contextmanager
    def within(self, kind: str) -> Iterator[None]:
        """Give the time inside to ``kind``, and afterwards to the kind from before."""
        former = self.switch(kind)
        try:
            yield
        except BaseException:
            self.failed = self.failed or self.kind  # the innermost
            raise
        finally:
            self.switch(former)

    @contextmanager
    def part(self, name: str, kind: str = "other") -> Iterator[None]:
        """Add the seconds inside to that part of the run; those that nothing inside claims go to ``kind``."""
        begin = time.perf_counter()
        try:
            with self.within(kind):
                yield
        finally:
            parts = self.history["seconds_by_part"]
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - begin

    def since_checkpoint(self) -> float:
        return time.perf_counter() - self.checkpoint

    def images_per_second(self) -> float | None:
        return self.history["timed_images"] / self.history["timed_seconds"] if self.history["timed_seconds"] else None

    def time_share(self) -> dict[str, float] | None:
        """{kind: share of the time after start-up and compilation}, in all 1, and ``overhead``, what is neither step nor
        evaluation; beside them ``startup_seconds`` and ``compile_seconds``. None before any time has passed."""
        self.switch(self.kind)
        seconds = {kind: self.kinds.get(kind, 0.0) for kind in KINDS}
        total = sum(seconds.values())
        if not total:
            return None
        shares = {kind: value / total for kind, value in seconds.items()}
        overhead = sum(share for kind, share in shares.items() if kind not in USEFUL)
        return {**shares, "overhead": overhead, **{f"{kind}_seconds": self.kinds.get(kind, 0.0) for kind in BEFORE}}


def _graphs() -> int:
    """Graphs that torch.compile has made in this process; a run that compiles nothing never imports the compiler."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
