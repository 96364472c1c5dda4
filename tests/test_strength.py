"""Defaults of strengths are those that the search on held-out images chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lifequant import options

FOUND = Path(__file__).resolve().parents[1] / "resnet-20-cifar-10" / "results" / "search_strength" / "found.json"
RECORD = json.loads(FOUND.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RECORD["chosen"])
def test_default(name):
    """The value with the best score of the table."""
    assert 0 < RECORD["protocol"]["tasks"]["held_out"] < 1
    rows = [row for row in RECORD["tried"] if row["method"] == name and "score" in row]
    (flag,) = {row["flag"] for row in rows}
    best = max(rows, key=lambda row: row["score"])["value"]
    assert RECORD["chosen"][name] == best
    assert options.make(method=name).asdict()[flag] == best
