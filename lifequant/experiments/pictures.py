"""The pictures of a report. They need matplotlib (extra ``plot``). Their colors suit color-blind readers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lifequant.experiments.rows import ACCURACY, FORGETTING, SPEED, TOTAL, Row, Table, error_growth

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#6A3D9A", "#7F7F7F")
MARKERS = "osD^vPX*<>"
LINES, MATRICES, BARS, POINTS = 10, 12, 4, 40  # rows a picture has room for
WIDE, DPI = 7.6, 110  # inches, and pixels an inch: 836 pixels, what a README shows
LONGEST = 30


def average(values: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each entry over seeds."""
    return [statistics.fmean(entries) for entries in zip(*values, strict=True)]


def mean_matrix(row: Row) -> list[list[float]]:
    """R, the mean over seeds."""
    return [average([run.results["top1"][t] for run in row.runs]) for t in range(len(row.first.results["top1"]))]


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


def spread_out(axis: Any, side: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic, with plain numbers, if its values span more than a factor of 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(values) <= 0 or max(values) <= 5 * min(values):
        return
    getattr(axis, f"set_{side}scale")("log")
    ticks = getattr(axis, f"{side}axis")
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


class Painter:
    """Draws the pictures of one table. A row has the same color and marker in each."""

    def __init__(self, table: Table) -> None:
        self.table, self.rows = table, table.rows
        self.names = short_names(table.rows)
        self.look = {
            row.label: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)]}
            for i, row in enumerate(table.rows)
        }
        self.tasks = [task["id"] for task in table.rows[0].first.results["tasks"]]

    def figure(self, high: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Any, Any]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDE, high), dpi=DPI, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
        for axis in axes.flat:
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        return figure, axes

    def lines(self, values: dict[str, Sequence[float]], ticks: Sequence[Any], turned: bool = False) -> tuple[Any, Any]:
        """A line for each row over named positions. The legend beside has the order of the lines' right ends."""
        figure, axes = self.figure(4.4 if turned else 3.6)
        axis = axes[0][0]
        for label, ys in sorted(values.items(), key=lambda item: -item[1][-1]):
            axis.plot(range(len(ys)), ys, label=self.names[label], lw=1.6, ms=5, **self.look[label])
        axis.set_xticks(range(len(ticks)), ticks, rotation=90 if turned else 0)
        axis.grid(axis="y", color="0.9", lw=0.7)
        return figure, axis

    def legend(self, axis: Any) -> None:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8, frameon=False)

    def matrices(self) -> Any:
        """The accuracy matrices, mean over seeds."""
        rows, size = self.rows[:MATRICES], len(self.tasks)
        columns = min(len(rows), 4 if size <= 5 else 3 if size <= 8 else 2)
        lines = -(-len(rows) // columns)
        wide = WIDE / columns
        figure, axes = self.figure(lines * wide * (1.12 if columns > 1 else 0.7) + 0.2, lines, columns)
        for axis in axes.flat[len(rows) :]:
            axis.set_axis_off()
        for axis, row in zip(axes.flat, rows, strict=False):
            R, name = mean_matrix(row), self.names[row.label]
            shown = axis.imshow(R, cmap="Blues", vmin=0, vmax=100)
            for t, values in enumerate(R if size <= 10 else []):
                for i, value in enumerate(values):
                    color = "white" if value > 60 else "black"
                    axis.text(i, t, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
            axis.set_title(
                f"{name if len(name) <= 24 else '…' + name[-23:]}\naverage {row.mean(ACCURACY):.1f}", fontsize=8
            )
            step = -(-size // 10)
            axis.set_xticks(range(0, size, step), self.tasks[::step])
            axis.set_yticks(range(0, len(R), step), ["all"] if row.first.joint else self.tasks[: len(R) : step])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        figure.supxlabel("tested on task", fontsize=9)
        figure.supylabel("after task", fontsize=9)
        figure.colorbar(shown, ax=axes, label="top-1 (%)", shrink=0.7, pad=0.02).ax.tick_params(labelsize=8)
        return figure

    def accuracy_over_tasks(self) -> Any:
        """Mean accuracy on the tasks seen so far, after each task."""
        rows = self.rows[:LINES]
        values = {row.label: over_tasks(mean_matrix(row)) for row in rows if not row.first.joint}
        if not values or len(self.tasks) < 2:
            return None
        figure, axis = self.lines(values, self.tasks)
        for row in rows:
            if row.first.joint:
                axis.axhline(
                    row.mean(ACCURACY), color=self.look[row.label]["color"], ls=":", label=self.names[row.label]
                )
        axis.set_xlabel("after task", fontsize=9)
        axis.set_ylabel("mean top-1 on tasks seen (%)", fontsize=9)
        self.legend(axis)
        return figure

    def space_shift(self) -> Any:
        """RMSE between the quantized weights at the ends of two tasks, mean over pairs of tasks, layer by layer."""
        values, layers = {}, list(layer_shifts(self.rows[0].first.results))
        for row in self.rows[:LINES]:
            found = [layer_shifts(run.results) for run in row.runs]
            common = all(set(shifts) == set(found[0]) for shifts in found)
            if found[0] and common and (not layers or set(layers) == set(found[0])):
                layers = layers or list(found[0])
                values[row.label] = average([[shifts[layer] for layer in layers] for shifts in found])
        if not values:
            return None
        figure, axis = self.lines(values, layers, turned=True)
        axis.set_ylabel("space shift (RMSE)", fontsize=9)
        spread_out(axis, "y", [shift for row in values.values() for shift in row])
        self.legend(axis)
        return figure

    def quantization_error(self) -> Any:
        """The last model's quantization error on each former task over that of the model of that task, xi(s,T)/xi(s,s),
        geometric mean over seeds. The paper proves at least 1."""
        values = {}
        for row in self.rows[:LINES]:
            found = [growth for run in row.runs if (growth := error_growth(run))]
            if found:
                values[row.label] = [statistics.geometric_mean(ratios) for ratios in zip(*found, strict=True)]
        if not values:
            return None
        figure, axis = self.lines(values, self.tasks[:-1])
        axis.axhline(1, color="0.4", lw=1, ls="--")
        spread_out(axis, "y", [1, *(growth for row in values.values() for growth in row)])
        axis.set_xlabel("former task s", fontsize=9)
        axis.set_ylabel("xi(s,T) / xi(s,s)", fontsize=9)
        self.legend(axis)
        return figure

    def code_histograms(self) -> Any:
        """How often each weight code occurs in an early and a late layer, first seed."""
        rows = [row for row in self.rows if row.first.results["code_histograms"]][:BARS]
        shared = [n for n in (rows[0].first.results["code_histograms"] if rows else ()) if n.endswith(".weight_quant")]
        shared = [n for n in shared if all(n in row.first.results["code_histograms"] for row in rows)]
        inner = shared[1:-1] or shared  # the first and the last layer have bits of their own
        if not inner:
            return None
        layers = list(dict.fromkeys([inner[0], inner[-1]]))
        figure, axes = self.figure(1.25 * len(rows) + 0.8, len(rows), len(layers), sharex="col")
        for line, row in zip(axes, rows, strict=True):
            for axis, layer in zip(line, layers, strict=True):
                found = row.first.results["code_histograms"][layer]
                total = max(1, sum(found["counts"]))
                codes = range(found["first_code"], found["first_code"] + len(found["counts"]))
                heights = [100 * count / total for count in found["counts"]]
                axis.bar(codes, heights, width=0.9, color=self.look[row.label]["color"])
                axis.set_title(f"{self.names[row.label]}: {layer.removesuffix('.weight_quant')}", fontsize=8)
                axis.set_ylim(bottom=0)
        for axis in axes[-1]:
            axis.set_xlabel("code", fontsize=9)
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.supylabel("weights (%)", fontsize=9)
        return figure

    def points(self, x: Callable[[Row], float | None], y: Callable[[Row], float | None], log: bool) -> tuple[Any, Any]:
        """A point for each row. The names stand beside in a column, in the order of the points, so that none covers another."""
        found = [(x(row), y(row), row.label) for row in self.rows[:POINTS]]
        found = sorted(((a, b, label) for a, b, label in found if a and b is not None), key=lambda point: point[1])
        if not found:
            return None, None
        gap_inches, high = 0.18, max(3.6, 0.18 * len(found) + 1.2)
        figure, axes = self.figure(high)
        axis = axes[0][0]
        for a, b, label in found:
            axis.plot(a, b, ls="", ms=7, **self.look[label])
        if log:
            spread_out(axis, "x", [a for a, _, _ in found])
        axis.margins(0.08)
        low, top = axis.get_ylim()
        gap, heights = gap_inches / (high - 0.9), []
        for _, b, _ in found:
            heights.append(max((b - low) / (top - low), heights[-1] + gap if heights else 0.0))
        limit = 1.0
        for i in reversed(range(len(heights))):
            heights[i], limit = min(heights[i], limit), min(heights[i], limit) - gap
        for (a, b, label), height in zip(found, heights, strict=True):
            line = {"arrowstyle": "-", "color": "0.75", "lw": 0.7, "shrinkA": 1, "shrinkB": 4}
            axis.annotate(self.names[label], (a, b), (1.04, height), textcoords="axes fraction", va="center", fontsize=8,
                          color="black", arrowprops=line, zorder=1)  # fmt: skip
        axis.grid(color="0.92", lw=0.7)
        axis.set_axisbelow(True)
        return figure, axis

    def forgetting_and_bytes(self) -> Any:
        """What is kept (the packed model and all else between tasks) against what is forgotten."""
        figure, axis = self.points(lambda row: row.mean(TOTAL), lambda row: row.mean(FORGETTING), log=True)
        if figure:
            axis.set_xlabel("kB kept in all", fontsize=9)
            axis.set_ylabel("forgetting (points)", fontsize=9)
        return figure

    def time_and_accuracy(self) -> Any:
        """Training time an image against average accuracy."""
        figure, axis = self.points(
            lambda row: 1000 / speed if (speed := row.mean(SPEED)) else None, lambda row: row.mean(ACCURACY), log=False
        )
        if figure:
            axis.set_xlabel("ms an image, in training", fontsize=9)
            axis.set_ylabel("average accuracy (%)", fontsize=9)
        return figure


PICTURES = (
    (Painter.matrices, MATRICES),
    (Painter.accuracy_over_tasks, LINES),
    (Painter.forgetting_and_bytes, POINTS),
    (Painter.space_shift, LINES),
    (Painter.quantization_error, LINES),
    (Painter.code_histograms, BARS),
    (Painter.time_and_accuracy, POINTS),
)


def draw(table: Table, out: Path) -> Iterator[tuple[str, str]]:
    """Write the table's pictures into ``out``. Returns (file name, caption) of each."""
    painter = Painter(table)
    for paint, room in PICTURES:
        figure = paint(painter)
        if figure is None:
            continue
        name = f"{paint.__name__}_{table.name}.png"
        figure.savefig(out / name, metadata={"Software": None})
        caption = " ".join(paint.__doc__.split())
        if len(table.rows) > room:
            caption += f" The {room} rows of {len(table.rows)} with the best average accuracy."
        yield name, caption
