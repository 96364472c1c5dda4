"""Two small tables of a few runs: what they learned and forgot, and what it cost.

lifequant compare experiment/quickstart/original experiment/quickstart/ours
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lifequant.common.arguments import Parser
from lifequant.common.errors import one_line
from lifequant.common.text import wrapped
from lifequant.experiments.result_files import read_all
from lifequant.results.table import CLASS_IL, TASK_IL, not_b_bit, task_il

MEMORY = ("packed_model", "replay", "importance", "reference")  # the rest is "other"
LEGEND = """\
Class-IL: class-incremental accuracy, the average: mean top-1 over all tasks
after the last one, in percent. Task-IL: task-incremental, the same choosing
among a task's own classes (task-masked). forgetting: points lost since a task
was best. shift: RMSE between the quantized weights at the ends of two tasks,
mean over layers and pairs of tasks."""


def mean_shift(space_shift: dict[str, list[list[float]]]) -> float | None:
    """Mean over layers and over pairs of tasks s < t; None for a single task."""
    values = [row[t] for matrix in space_shift.values() for s, row in enumerate(matrix) for t in range(s + 1, len(row))]
    return sum(values) / len(values) if values else None


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def accuracy_row(results: dict[str, Any]) -> list[str]:
    config = results["config"]
    return [
        config["method"],
        config["quantizer"] if min(config["bitW"], config["abitW"]) < 32 else "-",
        f"{config['bitW']}/{config['abitW']}",
        number(results["average_accuracy"]),
        number(task_il(results)),
        number(results["forgetting"]),
        number(mean_shift(results["space_shift"]), 4),
    ]


def cost_row(results: dict[str, Any]) -> list[str]:
    memory = results["memory_bytes"]
    kilobytes = [number(memory[kind] / 1000, 1) for kind in MEMORY]
    kilobytes.append(number(sum(size for kind, size in memory.items() if kind not in MEMORY) / 1000, 1))
    return [*kilobytes, number(sum(memory.values()) / 1000, 1), number(results["images_per_second"], 0)]


def table(heads: Sequence[tuple[str, int]], rows: dict[str, list[str]]) -> str:
    """A table of at most 80 columns. Texts are cut at their column; the first column, the run's name, takes what is left."""
    first = min(80 - sum(width + 1 for _, width in heads), max(3, *map(len, rows)))
    lines = [f"{'run':<{first}}" + "".join(f" {head:>{width}}" for head, width in heads)]
    for name, cells in rows.items():
        short = name if len(name) <= first else "~" + name[1 - first :]
        lines.append(
            f"{short:<{first}}"
            + "".join(f" {cell[:width]:>{width}}" for cell, (_, width) in zip(cells, heads, strict=True))
        )
    return "\n".join(lines)


def compare(runs: dict[str, dict[str, Any]]) -> str:
    accuracy = (("method", 10), ("quantizer", 9), ("bits", 5), (CLASS_IL, 8), (TASK_IL, 7))
    accuracy += (("forgetting", 10), ("shift", 7))
    cost = (
        ("model", 7),
        ("replay", 8),
        ("importance", 10),
        ("reference", 9),
        ("other", 7),
        ("total kB", 8),
        ("images/s", 8),
    )
    runs = {one_line(name): results for name, results in runs.items()}
    parts = [
        table(accuracy, {name: accuracy_row(results) for name, results in runs.items()}),
        "memory in kB: the packed model and what is kept between tasks; speed in training\n"
        + table(cost, {name: cost_row(results) for name, results in runs.items()}),
        LEGEND,
    ]
    over = [f"{name} ({text})" for name, results in runs.items() if (text := not_b_bit(results))]
    if over:
        parts.append(wrapped(f"note: not b-bit: {', '.join(over)}"))
    tasks = [[(task["classes"], task["test_images"]) for task in results["tasks"]] for results in runs.values()]
    if any(other != tasks[0] for other in tasks):
        parts.append("note: these runs were not tested on the same tasks")
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Print the tables. Raises UserError."""
    parser = Parser(description="Compare runs by their results.json.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its results.json")
    print(compare(read_all(parser.parse_args(argv).runs)))
    return 0
