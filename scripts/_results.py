"""Reading results.json, for the scripts of this folder."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("lifequant") is None:  # a bare clone that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lifequant.common.errors import UserError
from lifequant.results import schema

NEEDED = (
    "config",
    "tasks",
    "top1",
    "top1_masked",
    "average_accuracy",
    "forgetting",
    "space_shift",
    "memory_bytes",
    "max_codes_per_tensor",
    "images_per_second",
)


def read(given: str) -> tuple[str, dict[str, Any]]:
    """(the run's name, results.json's content) of a run's folder or of the file itself. Raises UserError."""
    path = Path(given)
    path = path / "results.json" if path.is_dir() else path
    try:
        results = schema.read(path, NEEDED)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run writes its results.json at its end") from None
    return path.resolve().parent.name, results


def read_all(given: list[str]) -> dict[str, dict[str, Any]]:
    """{name: results}; runs whose folders are called alike are told apart by the folders above. Raises UserError."""
    found = [(Path(path), *read(path)) for path in given]
    names = [name for _, name, _ in found]
    if len(set(names)) < len(names):
        names = [f"{(p if p.is_dir() else p.parent).resolve().parent.name}/{name}" for p, name, _ in found]
    if len(set(names)) < len(names):
        names = [f"{name} {place}" for place, name in enumerate(names)]
    return {name: results for name, (_, _, results) in zip(names, found, strict=True)}
