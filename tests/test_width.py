"""What is printed fits a terminal of 80 columns, with the longest names too, and uses the field's words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support.equal import read
from support.tiny import train

from lifequant import options, progressive_bits, registry
from lifequant.experiments.compare import compare
from lifequant.results.table import table

LONG = "a_name_that_is_as_long_as_the_names_of_a_quantizer_or_of_a_run_may_ever_become_here"


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> dict[str, Any]:
    job = tmp_path_factory.mktemp("width") / "run"
    train(tiny, job, method="replay")
    return read(job)


def large(small: dict[str, Any], tasks: int, first: int) -> dict[str, Any]:
    """The results as those of many tasks with large numbers, of a quantizer with a long name that exceeds its bits."""
    found = copy.deepcopy(small)
    found["tasks"] = [{**found["tasks"][0], "id": first + i} for i in range(tasks)]
    for name in ("top1", "top5", "top1_masked"):
        found[name] = [[100.0] * tasks for _ in range(tasks)]
    found["config"] |= {"method": LONG, "quantizer": LONG}
    found["max_codes_per_tensor"] = {"x": {"codes": 10**6, "bits": 4}}
    found["memory_bytes"] = {f"{name}_of_this_run": 10**9 for name in (*found["memory_bytes"], LONG)}
    found["memory_bytes"] |= small["memory_bytes"]
    for name in ("forgetting", "forgetting_rate", "bwt", "fwt"):
        found[name] = -100.0
    return found


def is_narrow(text: str) -> bool:
    return max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(("tasks", "first"), [(2, 0), (8, 0), (9, 0), (50, 100), (20, 10**9), (20, 10**17)])
def test_final_table(tasks, first, small):
    text = table(large(small, tasks, first))
    assert is_narrow(text)
    assert f"test {first}" in text and f"test {first + tasks - 1}" in text
    assert f"after task {first + tasks - 1} " in text


def test_words(small):
    """Each scenario and each measure is explained; the average of the task-masked accuracy is that of its last row."""
    small = {**small, "top1_masked": [[1.0, 2.0], [50.0, 60.5]], "average_accuracy": 12.5, "forgetting": 1.25}
    text = table(small)
    assert "average accuracy (Class-IL) 12.50" in text and "average task-masked accuracy (Task-IL) 55.25" in text
    for begin in ("Class-IL: class-incremental", "Task-IL: task-incremental", "forgetting: ", "BWT: backward", "FWT: "):
        assert sum(line.startswith(begin) for line in text.splitlines()) == 1, begin
    alone = table({**small, **dict.fromkeys(("forgetting", "forgetting_rate", "bwt", "fwt"))})
    assert "forgetting -" in alone and "BWT: " not in alone and "Class-IL: " in alone


def test_compare(small):
    text = compare({LONG: large(small, 3, 10**9), "b": small})
    assert is_narrow(text) and "Class-IL" in text and "Task-IL" in text and "note: not b-bit" in text


def test_progressive_bits(small):
    config = options.make(bit_schedule="32,8,4,3,2")
    found = [{**small, "average_accuracy": 100.0, "top1": [[100.0, 100.0]] * 2, "forgetting": -100.0}] * 5
    text = progressive_bits.table(config, found)
    assert is_narrow(text) and "Class-IL" in text and "Task-IL" in text and "2bit" in text


def test_list(monkeypatch):
    registry.names("method")
    monkeypatch.setitem(registry._registered["method"], LONG[:30], type("Long", (), {"help": f"{LONG} " * 5}))
    assert is_narrow(registry.describe()) and LONG[:30] in registry.describe()
