"""Which code wrote a run's results."""

from __future__ import annotations

import subprocess

import torch

import lifequant
from lifequant.common.files import TOP


def versions() -> dict[str, str | None]:
    """The versions of torch and lifequant, and the clone's commit."""
    return {"torch": torch.__version__, "lifequant": lifequant.__version__, "commit": commit()}


def commit() -> str | None:
    """The clone's commit, with "+" where files differ from it; None in an installed wheel."""
    if TOP is None:
        return None
    try:
        words = ["git", "-C", str(TOP), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
