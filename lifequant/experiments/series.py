"""The numbers of a report's pictures: means over seeds, and their standard deviations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from lifequant.experiments.columns import TOTAL, Metric
from lifequant.experiments.rows import Row, Table, error_growth

LONGEST = 30  # letters of a row's name


class Series(NamedTuple):
    """A mean over seeds at each position, and what an error bar reaches below and above it (0 for a single seed)."""

    means: list[float]
    below: list[float]
    above: list[float]

    @property
    def ends(self) -> list[float]:
        """All that an axis has to show."""
        low = [mean - less for mean, less in zip(self.means, self.below, strict=True)]
        return [*low, *(mean + more for mean, more in zip(self.means, self.above, strict=True))]


def over_seeds(values: Sequence[Sequence[float]]) -> Series:
    """Mean and standard deviation (n - 1) of each position; ``values`` has a sequence for each seed."""
    entries = list(zip(*values, strict=True))
    spread = [statistics.stdev(of) if len(of) > 1 else 0.0 for of in entries]
    return Series([statistics.fmean(of) for of in entries], spread, spread)


def geometric(values: Sequence[Sequence[float]]) -> Series:
    """The same of the values' logarithms, for ratios."""
    logs = over_seeds([[math.log(value) for value in of] for of in values])
    means = [math.exp(mean) for mean in logs.means]
    pairs = list(zip(means, logs.below, strict=True))
    return Series(means, [m - m * math.exp(-s) for m, s in pairs], [m * math.exp(s) - m for m, s in pairs])


def of_metric(row: Row, metric: Metric) -> Series | None:
    """One position; None where no run has the metric."""
    values = list(row.values(metric).values())
    return over_seeds([[value] for value in values]) if values else None


def milliseconds(speed: Series | None) -> Series | None:
    """Milliseconds an image, of images a second."""
    if speed is None or not speed.means[0]:
        return None
    (mean,), (spread,) = speed.means, speed.below
    return Series([1000 / mean], [1000 / mean - 1000 / (mean + spread)], [1000 * spread / mean**2])


def mean_matrix(row: Row) -> list[list[float]]:
    """R, the mean over seeds."""
    return [
        over_seeds([run.results["top1"][t] for run in row.runs]).means for t in range(len(row.first.results["top1"]))
    ]


def over_tasks(R: Sequence[Sequence[float]]) -> list[float]:
    """Mean accuracy on the tasks seen, after each task."""
    return [statistics.fmean(row[: t + 1]) for t, row in enumerate(R)]


def layer_shifts(results: dict[str, Any]) -> dict[str, float]:
    """{layer: mean over pairs of tasks s < t}"""
    pairs = {
        layer: [row[t] for s, row in enumerate(matrix) for t in range(s + 1, len(row))]
        for layer, matrix in results["space_shift"].items()
    }
    return {layer: statistics.fmean(values) for layer, values in pairs.items() if values}


def accuracies(rows: Sequence[Row]) -> dict[str, Series]:
    """{row: mean accuracy on the tasks seen, after each task}; joint training has one task and is left out."""
    return {r.label: over_seeds([over_tasks(run.results["top1"]) for run in r.runs]) for r in rows if not r.first.joint}


def shifts(rows: Sequence[Row]) -> tuple[list[str], dict[str, Series]]:
    """(layers, {row: space shift of each layer}), of the rows that have the layers of the first."""
    layers, values = [], {}
    for row in rows:
        found = [layer_shifts(run.results) for run in row.runs]
        layers = layers or list(found[0])
        if layers and all(set(of) == set(layers) for of in found):
            values[row.label] = over_seeds([[of[layer] for layer in layers] for of in found])
    return layers, values


def growths(rows: Sequence[Row]) -> dict[str, Series]:
    """{row: xi(s,T) / xi(s,s) of each former task}, of the rows where it is defined."""
    found = {row.label: [ratios for run in row.runs if (ratios := error_growth(run))] for row in rows}
    return {label: geometric(values) for label, values in found.items() if values}


def over_budgets(tables: Sequence[Table], metric: Metric) -> dict[str, tuple[list[float], Series]]:
    """{row without its budget: (mean kB that are kept, the metric)}, by bytes, of the rows that have several budgets."""
    found: dict[str, list[tuple[float, Series]]] = {}
    for row in (row for table in tables for row in table.rows if row.budget):
        label = "/".join(part for part in row.label.split("/") if not part.startswith("memory_budget"))
        kept, values = row.mean(TOTAL), of_metric(row, metric)
        if kept is not None and values:
            found.setdefault(label, []).append((kept, values))
    lines = {label: sorted(points) for label, points in found.items() if len(points) > 1}
    return {
        label: (
            [kept for kept, _ in points],
            Series(*([end for (end,) in of] for of in zip(*(v for _, v in points), strict=True))),
        )
        for label, points in lines.items()
    }


def short_names(rows: Sequence[Row]) -> dict[str, str]:
    """Short labels: without the folders that all have in common, and cut in front. A $ is escaped, since it begins a formula."""
    parts = [row.label.split("/") for row in rows]
    for end in (0, -1):
        while len(rows) > 1 and all(len(p) > 1 and p[end] == parts[0][end] for p in parts):
            for p in parts:
                del p[end]
    names = ["/".join(p) for p in parts]
    cut = [name if len(name) <= LONGEST else "…" + name[1 - LONGEST :] for name in names]
    return {row.label: name.replace("$", r"\$") for row, name in zip(rows, cut, strict=True)}
