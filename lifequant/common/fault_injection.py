"""Kill a run on purpose, for tests and scripts/torture.py: ``LIFEQUANT_FAULT=checkpoint:3`` sends SIGKILL when the point
``checkpoint`` is reached for the third time. Without the variable a point costs one comparison. No point is in a training
step."""

from __future__ import annotations

import os
import signal

POINTS = {
    "cache": "while the image cache is built",
    "begin": "between clearing a folder and its first file",
    "task": "after a task's begin, before its first step",
    "importance": "between a task's last step and the end of its method's estimates",
    "change": "between a task's evaluation and its checkpoint",
    "checkpoint": "a checkpoint's content is in its temporary file, not yet on disk",
    "rename": "the former checkpoint is kept as the one before, the new one not yet in its place",
    "table": "between the last checkpoint and results.json",
}

_name, _, _passing = os.environ.get("LIFEQUANT_FAULT", "").partition(":")
_left = int(_passing or 1) if _name else 0


def point(name: str) -> None:
    """Kill the process if LIFEQUANT_FAULT names this point."""
    global _left
    if name != _name:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
