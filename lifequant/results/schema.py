"""results.json as others may have written it: its types, before anything is printed of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from lifequant.common.errors import UserError

SCHEMA = 1
LARGEST = 2**26  # bytes of a file; a run of fifty tasks writes less than a million
LONGEST = 10_000  # characters of a text in it
_MATRICES = ("top1", "top5", "top1_masked", "top1_nme")
_NUMBERS = ("average_accuracy", "average_accuracy_weighted", "average_accuracy_nme", "average_incremental_accuracy",
            "forgetting", "forgetting_rate", "bwt", "fwt", "seconds", "images_per_second")  # fmt: skip
TABLE = ("config", "tasks", "top1", "top1_masked", "average_accuracy", "average_accuracy_weighted", "average_accuracy_nme",
         "forgetting", "forgetting_rate", "bwt", "fwt", "memory_bytes", "max_codes_per_tensor")  # fmt: skip


def read(path: Path, needed: Iterable[str]) -> dict[str, Any]:
    """The content. Raises FileNotFoundError, and UserError for what no run wrote."""
    try:
        if path.stat().st_size > LARGEST:
            _refuse(path, f"it has {path.stat().st_size / 1e6:.0f} MB")
        found = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=lambda name: _refuse(path, f"it has {name}")
        )
    except (ValueError, RecursionError):
        _refuse(path, "it can't be read as JSON")
    return check(found, path, needed)


def check(found: Any, path: Path | str, needed: Iterable[str]) -> dict[str, Any]:
    """``found`` itself, if it is what a run writes; ``path`` begins the message. Raises UserError."""
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or isinstance(found["schema"], bool):
        _refuse(path, "its schema is another")
    for name in needed:
        if name not in found:
            _refuse(path, f"it has no {name}")
    bad = next((name for name, value in found.items() if not _good(name, value, found)), None)
    if bad is not None:
        _refuse(path, f"its {bad[:40]} is of another form")
    return found


def _refuse(path: Path | str, why: str) -> NoReturn:
    raise UserError(f"{path}: not a results.json of schema {SCHEMA} ({why}): remove it; --resume writes it anew")


def _good(name: str, value: Any, found: dict[str, Any]) -> bool:
    if not _short(value):
        return False
    if name == "tasks":
        return isinstance(value, list) and all(
            isinstance(t, dict) and type(t.get("id")) is int and isinstance(t.get("domain"), str | None) for t in value
        )
    if name in _MATRICES:
        width = len(found["tasks"]) if isinstance(found.get("tasks"), list) else -1
        rows = isinstance(value, list) and all(isinstance(r, list) and len(r) == width for r in value)
        none = value is None and name == "top1_nme"
        return none or bool(rows and value and all(_number(v) for row in value for v in row))
    if name in _NUMBERS:
        return value is None or _number(value)
    if name == "memory_bytes":
        return isinstance(value, dict) and all(_number(v) for v in value.values())
    if name == "max_codes_per_tensor":
        codes = isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())
        return codes and all(_number(v.get("codes")) and _number(v.get("bits")) for v in value.values())
    return name != "config" or (isinstance(value, dict) and "bitW" in value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value)


def _short(value: Any) -> bool:
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, str) and len(value) > LONGEST:
            return False
    return True
