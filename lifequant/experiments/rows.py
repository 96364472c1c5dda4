"""Group runs over seeds into rows and tables, and test their differences."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lifequant.common.errors import UserError
from lifequant.config import free_names
from lifequant.experiments.columns import ACCURACY, FORGETTING, SHIFT, Metric
from lifequant.experiments.grid_tasks import OF_THE_RUN
from lifequant.results.table import not_b_bit

try:
    from scipy import stats
except ImportError:
    raise UserError("reports need scipy: pip install 'lifequant[plot]'") from None

IGNORED = frozenset({"seed", "start_task"})  # a run forked at task 1 is the same, bit for bit, as one run alone
IMAGES = ("train_images", "test_images")
LEVEL = 0.05  # two-sided


class Run(NamedTuple):
    """One run: the row that it belongs to, its file (for messages), and its results."""

    label: str
    path: str
    results: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return self.results["config"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def joint(self) -> bool:
        return len(self.results["top1"]) < len(self.results["tasks"])


@dataclass
class Row:
    """Runs that differ in nothing but the seed."""

    label: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def exceeds(self) -> str:
        return next((text for run in self.runs if (text := not_b_bit(run.results))), "")

    @property
    def budget(self) -> int | None:
        """Bytes of --memory_budget."""
        return self.first.config.get("memory_budget")

    @property
    def domains(self) -> list[str]:
        """The tasks' names where all are domains, else empty."""
        names = [task.get("domain") for task in self.first.results["tasks"]]
        return names if all(names) else []

    def values(self, metric: Metric) -> dict[int, float]:
        """{seed: value} of the runs in which the metric is defined."""
        found = {run.seed: metric.of(run.results) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def minus(self, other: Row, metric: Metric) -> list[float]:
        """Differences over the seeds that both have."""
        mine, its = self.values(metric), other.values(metric)
        return [mine[seed] - its[seed] for seed in mine if seed in its]

    def mean(self, metric: Metric) -> float | None:
        values = self.values(metric)
        return statistics.fmean(values.values()) if values else None


def settings(run: Run) -> dict[str, Any]:
    """What all runs of a row must share: the configuration, and how many classes and images the tasks have.

    Where a grid made the tasks with each run's own seed, their sizes go by the seed too; the grid's [tasks] are shared then.
    """
    kept = {name: value for name, value in run.config.items() if name not in IGNORED | free_names()}
    tasks = run.results["tasks"]
    kept["number of tasks"] = len(tasks)
    if any(domains := [task.get("domain") for task in tasks]):
        kept["domains"] = domains
    kept["classes a task"] = [len(task["classes"]) for task in tasks]
    if (made := run.results.get("grid_tasks")) and made.get("task_seed") == OF_THE_RUN:
        return kept | {"[tasks] of the grid": made}
    for images in IMAGES:
        kept[f"{images} a task"] = [task[images] for task in tasks]
    # Not their images a task: how many of the stored ones have a class that the task lacks goes by the seed. So do coded bytes.
    if run.config.get("replay_codec", "raw") in ("raw", "bits4"):
        kept["bytes of replay"] = run.results["memory_bytes"]["replay"]
    return kept


def refuse_to_mix(runs: Sequence[Run]) -> None:
    """Raises UserError if runs of one label differ in anything but the seed, or if two have the same seed."""
    first, seeds = runs[0], {runs[0].seed: runs[0]}
    expected = settings(first)
    for run in runs[1:]:
        found, none = settings(run), object()
        for name in dict.fromkeys([*expected, *found]):
            a, b = expected.get(name, none), found.get(name, none)
            if a != b:
                values = ", ".join("none" if value is none else json.dumps(value)[:60] for value in (a, b))
                raise UserError(
                    f"{first.path} and {run.path}: one row ({run.label}), but {name} differs ({values}): "
                    f"{remedy(name, first, run)}"
                )
        if run.seed in seeds:
            raise UserError(
                f"{seeds[run.seed].path} and {run.path}: one row ({run.label}), and both have seed {run.seed}"
            )
        seeds[run.seed] = run


def remedy(name: str, first: Run, other: Run) -> str:
    """What to do about two runs of a row that differ in ``name``."""
    orders = [[task["classes"] for task in run.results["tasks"]] for run in (first, other)]
    if orders[0] != orders[1] and name.endswith((" a task", " of replay")):
        return (
            "their tasks have other classes, since they were made with another --seed; make the tasks of all runs with the "
            "same --seed, or run a grid, whose seeds are averaged either way"
        )
    return "only runs that differ in nothing but the seed are averaged; give them folders of other names"


def group(runs: Sequence[Run]) -> list[Row]:
    """Rows by label. Labels that share all settings and no seed become one row. Raises UserError (see refuse_to_mix)."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    alike: dict[str, list[str]] = {}
    for label, members in by_label.items():
        refuse_to_mix(members)
        alike.setdefault(json.dumps(settings(members[0]), sort_keys=True), []).append(label)
    rows = []
    for labels in alike.values():
        together = [run for label in labels for run in by_label[label]]
        if len({run.seed for run in together}) == len(together):
            rows.append(Row(" + ".join(labels), together))
        else:
            rows += [Row(label, by_label[label]) for label in labels]
    for row in rows:
        row.runs.sort(key=lambda run: run.seed)
    return rows


@dataclass
class Table:
    """Rows at the same bit-width on the same data with the same budget of bytes, best average accuracy first."""

    bits: str
    name: str  # part of file names
    rows: list[Row]
    kind: str  # stands for the bits and the data

    def best(self, metric: Metric) -> Row | None:
        """The row whose mean is best, where it differs from the second best's by more than noise. Joint training sees
        all tasks at once and does not compete."""
        scored = [(mean, row) for row in self.rows if not row.first.joint and (mean := row.mean(metric)) is not None]
        if not metric.better or len(scored) < 2:
            return None
        (_, best), (_, second), *_ = sorted(scored, key=lambda pair: -metric.better * pair[0])
        differences = best.minus(second, metric)
        return best if metric.better * sum(differences) > 0 and paired_t_test(differences) < LEVEL else None


def task_sizes(rows: Sequence[Row], images: str) -> list[tuple[int, int]]:
    """(least, most) of each task over all runs: they differ where each seed has its own tasks."""
    found = [[task[images] for task in run.results["tasks"]] for row in rows for run in row.runs]
    return [(min(sizes), max(sizes)) for sizes in zip(*found, strict=True)]


def by_budget(rows: Sequence[Row]) -> list[tuple[int | None, list[Row]]]:
    """(budget, its rows), the smallest first; (None, all rows) where some have none."""
    budgets = {row.budget for row in rows}
    if None in budgets:
        return [(None, list(rows))]
    return [(budget, [row for row in rows if row.budget == budget]) for budget in sorted(budgets)]


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each bit-width and data set, and for each budget of bytes where all rows have one."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        config, common = row.first.config, settings(row.first)
        same = ("dataset", "image_size", "classes a task", "train_images a task", "test_images a task")
        data = [common.get(key) for key in same]
        tasks = [common.get("[tasks] of the grid"), common.get("domains")]
        key = json.dumps([config["bitW"], config["abitW"], *data, *tasks], sort_keys=True)
        found.setdefault((-config["bitW"], key), []).append(row)
    result: list[Table] = []
    names: Counter[str] = Counter()
    parts = [(key, *part) for (_, key), members in sorted(found.items()) for part in by_budget(members)]
    for key, budget, members in parts:
        bits, activations = (members[0].first.config[name] for name in ("bitW", "abitW"))
        alone = bits == activations
        name = f"{bits}bit" if alone else f"w{bits}a{activations}"
        title = f"{bits} bits" if alone else f"{bits}-bit weights, {activations}-bit activations"
        if budget:
            name, title = f"{name}_{budget / 1000:g}kB", f"{title}, {budget / 1000:,g} kB in all"
        members.sort(key=lambda row: (-(row.mean(ACCURACY) or 0.0), row.label))
        names[name] += 1
        if names[name] > 1:  # other data
            name, title = f"{name}_{names[name]}", f"{title} ({names[name]})"
        result.append(Table(title, name, members, key))
    return result


def paired_t_test(differences: Sequence[float]) -> float:
    """p, two-sided, of Student's t-test that the differences' mean is 0; 1 where fewer than two are there."""
    if len(differences) < 2:
        return 1.0
    if len(set(differences)) == 1:
        return 0.0 if differences[0] else 1.0
    return float(stats.ttest_1samp(differences, 0).pvalue)


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float] | None:
    """(rho, the ends of its 95 % interval by Fisher's z with Bonett and Wright's standard error); None where undefined."""
    if len(x) < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    rho = float(stats.spearmanr(x, y).statistic)
    if abs(rho) > 1 - 1e-12:
        return math.copysign(1.0, rho), -1.0, 1.0
    half_width = stats.norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    return rho, math.tanh(math.atanh(rho) - half_width), math.tanh(math.atanh(rho) + half_width)


def shift_and_forgetting(title: str, rows: Sequence[Row]) -> str:
    """A line on whether runs whose weights moved less forgot less."""
    pairs = [(SHIFT.of(run.results), FORGETTING.of(run.results)) for row in rows for run in row.runs]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    found = spearman([a for a, _ in pairs], [b for _, b in pairs])
    if found is None:
        return f"{title}: undefined (n = {len(pairs)} runs)"
    rho, low, high = found
    if abs(rho) == 1:
        return f"{title}: {rho:+.2f}, no interval at this extreme (n = {len(pairs)} runs)"
    return f"{title}: {rho:+.2f}, 95 % interval {low:+.2f} .. {high:+.2f} (n = {len(pairs)} runs)"


def error_growth(run: Run) -> list[float] | None:
    """xi(s, T) / xi(s, s) of each former task s, T the last; None where a network has no quantization error."""
    xi = run.results["quantization_error"]
    if run.joint or len(xi) < 2 or any(xi[s][s] <= 0 or xi[-1][s] <= 0 for s in range(len(xi) - 1)):
        return None
    return [xi[-1][s] / xi[s][s] for s in range(len(xi) - 1)]


def errors_that_fell(rows: Sequence[Row]) -> str:
    """How often the last model's quantization error on a former task is below that of the model of that task's time."""
    found = [ratio for row in rows for run in row.runs for ratio in error_growth(run) or ()]
    if not found:
        return "no quantization error of a former task"
    fell = sum(ratio < 1 for ratio in found)
    return f"below 1 in {fell} of {len(found)} cases, from {min(found):.2f} to {max(found):.2f}"
