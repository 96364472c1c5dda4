"""A run's results as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lifequant.common.errors import one_line
from lifequant.common.text import WIDTH, wrapped

WIDEST = 20  # letters of a domain's name
CLASS_IL, TASK_IL = "Class-IL", "Task-IL"
SCENARIOS = (  # the scenarios of continual learning, van de Ven et al. 2022
    f"{CLASS_IL}: class-incremental, the network chooses among all classes",
    f"{TASK_IL}: task-incremental (task-masked), it chooses among the task's own classes",
)
TRANSFER = (
    "forgetting: points lost since a task was best; its rate: in percent of that best",
    "BWT: backward transfer, points gained or lost since a task was learned",
    "FWT: forward transfer, points above a random network before a task is learned",
)


def not_b_bit(results: dict[str, Any]) -> str:
    """The quantizer and its most codes where a tensor has more than 2^bits of them; else an empty string."""
    over = [c["codes"] for c in results["max_codes_per_tensor"].values() if c["codes"] > 2 ** c["bits"]]
    return f"{results['config']['quantizer']} gives up to {max(over)} codes a tensor" if over else ""


def task_il(results: dict[str, Any]) -> float:
    """The task-incremental accuracy in percent: the mean of the last row of ``top1_masked``."""
    masked = results["top1_masked"][-1]
    return sum(masked) / len(masked)


def table(results: dict[str, Any]) -> str:
    """The accuracy matrix with its averages, at most 80 columns: the first tasks' columns that fit, and the last one's."""
    figures = [
        _pairs(
            (f"average accuracy ({CLASS_IL})", results["average_accuracy"]),
            ("weighted by test images", results["average_accuracy_weighted"]),
        ),
        _pairs((f"average task-masked accuracy ({TASK_IL})", task_il(results))),
        _pairs(
            ("forgetting", results["forgetting"]),
            ("forgetting rate", results["forgetting_rate"]),
            ("BWT", results["bwt"]),
            ("FWT", results["fwt"]),
        ),
        _memory(results),
    ]
    if exceeding := not_b_bit(results):
        figures.append(f"not {results['config']['bitW']}-bit: {exceeding}")
    explained = SCENARIOS if results["forgetting"] is None else (*SCENARIOS, *TRANSFER)
    return "\n".join([*_matrix(results), *map(wrapped, (*figures, *explained))])


def _memory(results: dict[str, Any]) -> str:
    sizes = {name: f"{size / 1000:.0f}" for name, size in results["memory_bytes"].items() if size}
    if images := results["tasks"][-1].get("stored_images"):
        sizes["replay"] += f" ({images} images)"
    return "memory (kB): " + "  ".join(f"{name} {size}" for name, size in sizes.items())


def _pairs(*pairs: tuple[str, float | None]) -> str:
    return "   ".join(f"{name} {'-' if value is None else format(value, '.2f')}" for name, value in pairs)


def _name(task: dict[str, Any], word: str) -> str:
    """The domain that a task is, cut to what a column can show; ``word`` and its number for other tasks."""
    name = one_line(task.get("domain") or "")
    return (name if len(name) <= WIDEST else f"{name[: WIDEST - 1]}…") or f"{word} {task['id']}"


def _matrix(results: dict[str, Any]) -> list[str]:
    """A row for each trained task, and what the last model is by other measures."""
    matrix, tasks = results["top1"], results["tasks"]
    names = ["after " + _name(task, "task") for task in tasks]
    names = names if len(matrix) == len(tasks) else ["after all tasks"]
    rows = [*zip(names, matrix, strict=True), ("task-masked", results["top1_masked"][-1])]
    if results["average_accuracy_nme"] is not None:
        rows.append(("by exemplars", results["top1_nme"][-1]))
    first = max(14, *(len(name) for name in names))
    heads = [_name(task, "test") for task in tasks]
    width = max(8, *(len(head) + 1 for head in heads))
    shown = _shown(len(tasks), (WIDTH - first) // width)
    lines = [f"{'top-1 (%)':<{first}}" + "".join(f"{heads[i]:>{width}}" for i in shown)]
    lines += [f"{name:<{first}}" + "".join(f"{values[i]:{width}.2f}" for i in shown) for name, values in rows]
    if len(shown) < len(tasks):
        lines.append(f"({len(tasks) - len(shown)} columns are not shown; results.json has all)")
    return lines


def _shown(columns: int, room: int) -> Sequence[int]:
    """Indices of the columns that are shown: all, or the first ones and the last one."""
    return range(columns) if columns <= room else [*range(room - 1), columns - 1]
