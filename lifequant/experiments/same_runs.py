"""Whether two runs are the same: every tensor of every checkpoint, results.json but for times, every curve."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TIMES = (
    "seconds", "seconds_by_part", "seconds_by_kind", "time_share", "images_per_second", "timed_seconds", "timed_images",
)  # fmt: skip
PLACES = ("job_dir", "resume", "checkpoint_seconds", "source_file", "cache_dir", "commit")
SKIPPED = ("previous.pt",)  # the last checkpoint but one: which that is depends on the time


def differences(run: Path, other: Path) -> list[str]:
    """A line for each difference of two runs; no line if they are the same."""
    found = []
    for pattern, load in (("*.pt", checkpoint), ("results.json", results)):
        names = [
            sorted(p.relative_to(f).as_posix() for p in f.rglob(pattern) if p.name not in SKIPPED) for f in (run, other)
        ]
        if names[0] != names[1] or not names[0]:
            found.append(f"{pattern}: {', '.join(sorted(set(names[0]) ^ set(names[1])) or ['none'])} not in both")
        for name in sorted({*names[0]} & {*names[1]}):
            found += unequal(load(run / name), load(other / name), name)
    return [*found, *unequal(curves(run), curves(other), "curves")]


def unequal(a: Any, b: Any, where: str) -> Iterator[str]:
    """The paths at which two structures of plain values and tensors are not the same bit for bit."""
    if type(a) is not type(b):
        yield f"{where}: {type(a).__name__} and {type(b).__name__}"
    elif isinstance(a, dict):
        for key in sorted({*a, *b} - {*TIMES, *PLACES}, key=str):
            if key in a and key in b:
                yield from unequal(a[key], b[key], f"{where}/{key}")
            else:
                yield f"{where}/{key}: in one only"
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{where}: {len(a)} and {len(b)} entries"
        for index, values in enumerate(zip(a, b, strict=False)):
            yield from unequal(*values, f"{where}/{index}")
    elif torch.is_tensor(a):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            yield f"{where}: tensors differ"
    elif a != b:
        yield f"{where}: {a!r} and {b!r}"


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def curves(folder: Path) -> dict[str, Any]:
    """{run: {tag: [(step, value)]}} as TensorBoard shows them, without speeds. A gap or a repeated step is a difference."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # else it tells of every step that a resumed run did again
    found = {}
    for run in sorted({path.parent for path in folder.rglob("events.*")}):
        events = EventAccumulator(str(run), {"scalars": 0}).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("5_speed/")]
        found[run.relative_to(folder).as_posix()] = {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags}
    return found
