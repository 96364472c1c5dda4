"""The tables of domain tasks in a report: the accuracy on every domain after every task, with what is kept of former ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lifequant.common.errors import one_line
from lifequant.experiments.compare import number
from lifequant.experiments.rows import Row, Table
from lifequant.experiments.tables import code, spoken

SAID = """\
Rows: after training on a domain, in their order. Then the domain's own training images and the stored images of former domains
that joined them; top-1 (Class-IL, %) on the test images of every domain, in brackets where it is not learned yet; and the
importances that were kept at the end."""


def markdown(table: Table) -> list[str]:
    """A table for each row of ``table`` whose tasks are domains; empty where none are."""
    rows = [row for row in table.rows if row.domains]
    if not rows:
        return []
    return [f"### Domains, {table.bits}", "", SAID, "", *(line for row in rows for line in of_row(row))]


def of_row(row: Row) -> list[str]:
    """The lines of one row's table; an average over seeds has the seeds' deviation beside it."""
    names = [code(one_line(name)) for name in row.domains]
    tasks = [[run.results["tasks"][t] for run in row.runs] for t in range(len(names))]
    heads = ["after", "training images", "replay images", *names, "importances, kB"]
    lines = [f"{code(row.label)} (n = {len(row.runs)}):", "", f"| {' | '.join(heads)} |"]
    lines.append("|---" + "|---:" * (len(heads) - 1) + "|")
    for t in range(len(row.first.results["top1"])):
        known = len(names) if row.first.joint else t + 1
        cells = [_mean([run.results["top1"][t][i] for run in row.runs]) for i in range(len(names))]
        cells = [cell if i < known else f"({cell})" for i, cell in enumerate(cells)]
        own = (
            [sum(task["train_images"] for task in seed) for seed in zip(*tasks, strict=True)]
            if row.first.joint
            else [task["train_images"] for task in tasks[t]]
        )
        kept = {name: [task.get("replay_of_domains", {}).get(name, 0) for task in tasks[t]] for name in row.domains}
        replay = [f"{spoken(n)} {code(one_line(name))}" for name, n in kept.items() if any(n)]
        sizes = [task["importance_bytes"] / 1000 for task in tasks[t] if "importance_bytes" in task]
        first = "all" if row.first.joint else names[t]
        importances = number(statistics.fmean(sizes), 1) if sizes else "-"
        lines.append("| " + " | ".join([first, spoken(own), ", ".join(replay) or "0", *cells, importances]) + " |")
    return [*lines, ""]


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {number(statistics.stdev(values), 1)}" if len(values) > 1 else ""
    return number(statistics.fmean(values), 1) + spread
