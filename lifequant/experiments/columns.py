"""The columns of a report: numbers of one run's results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from lifequant.config import Config
from lifequant.experiments.compare import MEMORY, mean_shift
from lifequant.training.schedule import epoch_images


class Metric(NamedTuple):
    """A column. ``better`` is 1 if more is better, -1 if less is better, 0 if the table names no best."""

    name: str
    head: str
    digits: int
    better: int
    of: Callable[[dict[str, Any]], float | None]


def masked(results: dict[str, Any]) -> float:
    return statistics.fmean(results["top1_masked"][-1])


def other_bytes(memory: dict[str, float]) -> float:
    return sum(size for kind, size in memory.items() if kind not in MEMORY)


def thousand_images(results: dict[str, Any]) -> float | None:
    """Images that the tasks were trained on, those of all epochs, in thousands. None for joint training and progressive bits."""
    config = results["config"]
    if len(results["top1"]) < len(results["tasks"]) or config.get("bit_schedule"):
        return None
    draws = Config(train_batch_size=config["train_batch_size"], replay_batch=config.get("replay_batch") or 0.0)
    epochs = (epoch_images(draws, task["train_images"], task["replay_images"]) for task in results["tasks"])
    return config["num_epochs"] * sum(epochs) / 1000


def _bytes_of(kind: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: results["memory_bytes"].get(kind, 0) / 1000


SCORES = (
    Metric("average_accuracy", "average (Class-IL, %)", 2, 1, lambda r: r["average_accuracy"]),
    Metric("task_masked_accuracy", "task-masked (Task-IL, %)", 2, 1, masked),
    Metric("forgetting", "forgetting", 2, -1, lambda r: r["forgetting"]),
    Metric("bwt", "BWT", 2, 1, lambda r: r["bwt"]),
    Metric("space_shift", "space shift", 4, -1, lambda r: mean_shift(r["space_shift"])),
)
ACCURACY, FORGETTING, SHIFT = SCORES[0], SCORES[2], SCORES[4]
COSTS = (
    *(Metric(f"{kind}_kB", kind.replace("packed_", "") + " kB", 1, 0, _bytes_of(kind)) for kind in MEMORY),
    Metric("other_kB", "other kB", 1, 0, lambda r: other_bytes(r["memory_bytes"]) / 1000),
    Metric("total_kB", "total kB", 1, 0, lambda r: sum(r["memory_bytes"].values()) / 1000),
    Metric("thousand_images", "trained on, k images", 0, 0, thousand_images),
    Metric("images_per_second", "images/s", 0, 0, lambda r: r["images_per_second"]),
)
TOTAL, SPEED = COSTS[-3], COSTS[-1]
