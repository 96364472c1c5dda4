"""Defaults of strengths are those that the search chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lifequant
from lifequant import options

RECORD = json.loads((Path(lifequant.__file__).parent / "methods" / "strength.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RECORD["chosen"])
def test_default(name):
    """The value with the best score of the table: average accuracy with replay, task-masked without."""
    rows = [row for row in RECORD["tried"] if row["method"] == name and "task_masked" in row]
    key = "average_accuracy" if rows[0]["replay"] else "task_masked"
    (flag,) = {row["flag"] for row in rows}
    best = max(rows, key=lambda row: row[key])["value"]
    assert RECORD["chosen"][name] == best
    assert options.make(method=name).asdict()[flag] == best


def test_what_it_is():
    assert "held-out" in RECORD["what"] and RECORD["command"].startswith("python scripts/search_strength.py")
