"""A run's results as a table for a terminal."""

from __future__ import annotations

from typing import Any


def not_b_bit(results: dict[str, Any]) -> str:
    """The quantizer and its most codes where a tensor has more than 2^bits of them; else an empty string."""
    over = [c["codes"] for c in results["max_codes_per_tensor"].values() if c["codes"] > 2 ** c["bits"]]
    return f"{results['config']['quantizer']} gives up to {max(over)} codes a tensor" if over else ""


def table(results: dict[str, Any]) -> str:
    """The accuracy matrix with its averages, readable at 80 columns: at most the first 7 and the last task's columns."""
    matrix, tasks = results["top1"], results["tasks"]
    shown = list(range(len(tasks))) if len(tasks) <= 8 else [*range(7), len(tasks) - 1]
    lines = ["top-1 (%)     " + "".join(f"{'test ' + str(tasks[i]['id']):>8}" for i in shown)]
    for row, values in enumerate(matrix):
        name = f"after task {tasks[row]['id']}" if len(matrix) == len(tasks) else "after all tasks"
        lines.append(f"{name:<15.15}"[:14] + "".join(f"{values[i]:8.2f}" for i in shown))
    masked = results["top1_masked"][-1]
    lines.append(f"{'task-masked':<14}" + "".join(f"{masked[i]:8.2f}" for i in shown))
    if len(shown) < len(tasks):
        lines.append(f"({len(tasks) - len(shown)} columns are not shown; results.json has all)")

    def line(*names: str) -> str:
        values = ((name, results[name.replace(" ", "_")]) for name in names)
        return "   ".join(f"{name} {'-' if v is None else format(v, '.2f')}" for name, v in values)

    memory = "  ".join(f"{name} {size / 1000:.0f}" for name, size in results["memory_bytes"].items() if size)
    if results["average_accuracy_nme"] is not None:
        lines.append(f"{'by exemplars':<14}" + "".join(f"{results['top1_nme'][-1][i]:8.2f}" for i in shown))
    return "\n".join(
        [
            *lines,
            line("average accuracy", "average accuracy weighted"),
            line("forgetting", "forgetting rate", "bwt", "fwt"),
            f"memory (kB): {memory}",
            *([f"not {results['config']['bitW']}-bit: {exceeding}"] if (exceeding := not_b_bit(results)) else []),
        ]
    )
