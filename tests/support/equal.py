"""Killing a run in process, and whether two runs are the same bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

TIMES = (
    "seconds", "seconds_by_part", "seconds_by_kind", "time_share", "images_per_second", "timed_seconds", "timed_images",
)  # fmt: skip
MAY_DIFFER = (*TIMES, "job_dir", "resume", "checkpoint_seconds", "commit")  # someone may commit while a test runs


def read(job: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((job / "results.json").read_text(), parse_constant=refuse)


def same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, whatever a checkpoint holds; times, the place on disk and the clone's commit apart."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in MAY_DIFFER:
                same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for place, values in enumerate(zip(a, b, strict=True)):
            same(*values, f"{where}/{place}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """The run dies in the ``call``-th call (from 1) of a function."""
    original, calls = getattr(module, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)
