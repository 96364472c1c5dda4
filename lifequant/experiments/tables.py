"""The tables of a report, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pandas as pd

from lifequant.experiments.columns import ACCURACY, COSTS, FORGETTING, SCORES, Metric
from lifequant.experiments.compare import number
from lifequant.experiments.rows import IMAGES, LEVEL, Row, Table, paired_t_test, task_sizes

MARK = "†"
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {c: "\\" + c for c in "&%$#_{}"}
LEGEND = """\
average: mean top-1 over all tasks after the last one, choosing among all classes (class-incremental, Class-IL).
task-masked: the same, choosing among a task's own classes (task-incremental, Task-IL).
forgetting: points lost since a task was best, before the last one. BWT: points on a task after the last one, less those
just after it was learned. space shift: RMSE between the quantized weights at the ends of two tasks, mean over layers and
pairs of tasks. kB: 1000 bytes; the packed model, and what is kept between tasks beside it. trained on: new and stored images
of all epochs, in thousands (of the source none). n: seeds; ± is the standard
deviation over them (n - 1). images/s: in training, on the machine each run had."""


def spoken(values: Sequence[Any]) -> str:
    """One value if all are the same, else all of them."""
    return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))


def ranges(sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Each (least, most) in words."""
    return [str(least) if least == most else f"{least} to {most}" for least, most in sizes]


def _differing(rows: Sequence[Row], name: str) -> str:
    found = sorted({run.config.get(name) for row in rows for run in row.runs}, key=str)
    return " or ".join("not named" if value is None else str(value) for value in found)


def versions(rows: Sequence[Row]) -> str:
    """The versions and commits that the runs were made with."""
    names = ("lifequant", "torch", "commit")
    found: dict[str, set[str]] = {name: set() for name in names}
    for row in rows:
        for run in row.runs:
            for name in names:
                found[name].add(str(run.results["versions"].get(name) or "unknown"))
    return "; ".join(f"{name} {', '.join(sorted(found[name]))}" for name in names)


def headers(table: Table) -> list[str]:
    """Lines on what holds for the whole table: data, training, seeds, versions."""
    rows = table.rows
    classes = [len(task["classes"]) for task in rows[0].first.results["tasks"]]
    train, test = (task_sizes(rows, images) for images in IMAGES)
    share = [f"{least / max(1, own):.0f}" for (least, _), own in zip(train, classes, strict=True)]
    seeds = sorted({run.seed for row in rows for run in row.runs})
    return [
        f"data: {one_name(_differing(rows, 'dataset'))}; tasks: {len(classes)}; classes a task: {spoken(classes)}; "
        f"training images a task: {spoken(ranges(train))} (a class: {spoken(share)}); "
        f"test images a task: {spoken(ranges(test))}; image size: {_differing(rows, 'image_size')}",
        f"epochs a task: {_differing(rows, 'num_epochs')}; batch: {_differing(rows, 'train_batch_size')}; "
        f"seeds: {', '.join(map(str, seeds))}",
        versions(rows),
    ]


def one_name(text: str) -> str:
    return "data set not named" if text == "not named" else text


def notes(table: Table) -> list[str]:
    """Lines on what bold means, and on rows that are not what the table's bits say."""
    if all(len(row.runs) == 1 for row in table.rows):
        found = ["one seed a row: nothing is in bold, for a difference can't be told from noise"]
    else:
        found = [
            f"bold: best in its column, where a paired t-test over the seeds that the best and the second best row both "
            f"have gives p < {LEVEL} (two-sided, each column on its own, not corrected for their number); rows with one "
            "seed can't be tested"
        ]
    if any(row.first.joint for row in table.rows):
        found.append("joint training sees all tasks at once: a reference, never in bold")
    found += [f"{MARK} {row.label}: not b-bit, {row.exceeds}" for row in table.rows if row.exceeds]
    return found


def cell(row: Row, metric: Metric, between: str = " ± ") -> str:
    """``mean ± std``; the mean alone for a single value, and for memory if the seeds have the same."""
    values = list(row.values(metric).values())
    if not values:
        return "-"
    mean = number(statistics.fmean(values), metric.digits)
    spread = number(statistics.stdev(values), metric.digits) if len(values) > 1 else ""
    if not spread or (metric in COSTS[:-1] and not float(spread)):
        return mean
    return mean + between + spread


def grid(table: Table, between: str, bold: str) -> list[list[str]]:
    """The cells of each row, behind its label; ``bold`` has a {} for what is the best."""
    best = {metric.name: table.best(metric) for metric in SCORES}
    return [
        [
            str(len(row.runs)),
            *(
                bold.format(text) if best.get(metric.name) is row else text
                for metric in (*SCORES, *COSTS)
                for text in [cell(row, metric, between)]
            ),
        ]
        for row in table.rows
    ]


def heads() -> list[str]:
    return ["row", "n", *(metric.head for metric in (*SCORES, *COSTS))]


def code(text: str) -> str:
    """Text that Markdown shows as it is, also in a table."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(heads()) + " |", "|---|" + "---:|" * (len(heads()) - 1)]
    for row, cells in zip(table.rows, grid(table, " ± ", "**{}**"), strict=True):
        lines.append("| " + " | ".join([code(row.label) + (f" {MARK}" if row.exceeds else ""), *cells]) + " |")
    said = [f"- {line}" for line in [*headers(table), *notes(table)]]
    return "\n".join([f"## {table.bits}", "", *said[:3], "", *lines, "", *said[3:], "", *paired(table)])


def paired(table: Table) -> list[str]:
    """A table of differences from the row with the best average, over the seeds that both have; empty for a single seed."""
    best, *others = [row for row in table.rows if not row.first.joint] or [None]
    lines = []
    for row in others:
        found = [row.minus(best, metric) for metric in (ACCURACY, FORGETTING)]
        if len(found[0]) > 1:
            cells = [f"{statistics.fmean(d):+.2f} | {paired_t_test(d):.3f}" if len(d) > 1 else "- | -" for d in found]
            lines.append(f"| {code(row.label)} | {len(found[0])} | " + " | ".join(cells) + " |")
    if not lines:
        return []
    said = f"Differences from {code(best.label)}, seed by seed (mean; p of a paired t-test, two-sided):"
    return [
        said,
        "",
        "| row | n | average (Class-IL) | p | forgetting | p |",
        "|---|---:|---:|---:|---:|---:|",
        *lines,
        "",
    ]


def csv_text(found: Sequence[Table]) -> str:
    """All tables as one CSV: means and standard deviations in columns of their own, to six digits."""
    about = ("dataset", "method", "quantizer", "bitW", "abitW", "num_epochs")
    lines = []
    for table in found:
        best = {metric.name: table.best(metric) for metric in SCORES}
        for row in table.rows:
            line: dict[str, Any] = {"table": table.name, "row": row.label}
            line |= {name: row.first.config.get(name) for name in about}
            line |= {"n": len(row.runs), "seeds": " ".join(str(run.seed) for run in row.runs)}
            for metric in (*SCORES, *COSTS):
                values = list(row.values(metric).values())
                line[f"{metric.name}_mean"] = f"{statistics.fmean(values):.6g}" if values else None
                line[f"{metric.name}_std"] = f"{statistics.stdev(values):.6g}" if len(values) > 1 else None
            line |= {f"{name}_best": int(one is row) for name, one in best.items()}
            lines.append(line | {"not_b_bit": row.exceeds})
    return pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")


def escaped(text: str) -> str:
    return "".join(SPECIAL.get(c, c) for c in text)


def latex(table: Table) -> str:
    """A table for the packages booktabs and graphicx."""
    columns = [rf"\shortstack{{{escaped(head).replace(' ', chr(92) * 2)}}}" for head in heads()[2:]]
    lines = [r"\begin{table}", r"\centering", r"\resizebox{\linewidth}{!}{%"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads()) - 1)}}}", r"\toprule"]
    lines += [" & ".join(["row", "n", *columns]) + r" \\", r"\midrule"]
    for row, cells in zip(table.rows, grid(table, r" $\pm$ ", r"\textbf{{{}}}"), strict=True):
        mark = r"$^\dagger$" if row.exceeds else ""
        lines.append(" & ".join([rf"\texttt{{{escaped(row.label)}}}{mark}", *map(_minus, cells)]) + r" \\")
    said = ". ".join([table.bits, *headers(table), *notes(table)])
    caption = escaped(said).replace(MARK, r"$^\dagger$").replace("±", r"$\pm$").replace("<", "$<$").replace(">", "$>$")
    lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}.}}", rf"\label{{tab:{table.name}}}"]
    return "\n".join([*lines, r"\end{table}", ""])


def _minus(text: str) -> str:
    return text if text == "-" else text.replace("-", "$-$")
