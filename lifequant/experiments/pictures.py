"""The pictures of a report. They need matplotlib (extra ``plot``). Their colors suit color-blind readers.

The tables of a report have the same axes and the same colors of accuracy, so that two bit-widths can be held side by side.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lifequant.experiments import series
from lifequant.experiments.columns import ACCURACY, FORGETTING, SPEED, TOTAL
from lifequant.experiments.plotting import NORMAL, SMALL, WIDE, heat, legend, new_figure, set_limits, top_of_scale
from lifequant.experiments.rows import Row, Table
from lifequant.experiments.series import Series

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#6A3D9A", "#7F7F7F",
          "#8B0000", "#9ACD32", "#1F3A93", "#E8B4F0")  # fmt: skip
MARKERS = "osD^vPX*<>"
LINES, MATRICES, BARS, POINTS = 10, 12, 4, 40  # rows a picture has room for
TITLE = 26  # letters of a line above a matrix
BAR = {"elinewidth": 0.9, "capsize": 2}


def kilobytes(row: Row) -> Series | None:
    return series.of_metric(row, TOTAL)


def forgetting(row: Row) -> Series | None:
    return series.of_metric(row, FORGETTING)


def accuracy(row: Row) -> Series | None:
    return series.of_metric(row, ACCURACY)


def milliseconds(row: Row) -> Series | None:
    return series.milliseconds(series.of_metric(row, SPEED))


class Painter:
    """Draws the pictures of one table of several. A row has the same color and marker in each."""

    def __init__(self, table: Table, tables: Sequence[Table]) -> None:
        self.table, self.rows, self.tables = table, table.rows, tables
        self.names = series.short_names(table.rows)
        self.look = {
            row.label: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[(i + i // len(COLORS)) % len(MARKERS)]}
            for i, row in enumerate(table.rows)
        }
        self.tasks = [task["id"] for task in table.rows[0].first.results["tasks"]]

    def of_all(self, shown: int, values: Callable[[Sequence[Row]], Iterator[Series]]) -> list[float]:
        """What an axis has to show that is the same in all tables; ``shown``: rows of each."""
        return [end for table in self.tables for found in values(table.rows[:shown]) for end in found.ends]

    def lines(self, values: dict[str, Series], ticks: Sequence[Any], turned: bool = False) -> tuple[Any, Any]:
        """A line for each row over named positions, with its deviation over seeds. The legend beside has the order of the
        lines' right ends. Rows stand a little apart, so that no bar hides another."""
        figure, axes = new_figure(WIDE, 4.6 if turned else 3.8)
        axis = axes[0][0]
        apart = 0.0 if turned else 0.03 * (len(ticks) - 1) / max(1, len(values) - 1)
        for i, (label, found) in enumerate(sorted(values.items(), key=lambda item: -item[1].means[-1])):
            at = [tick + apart * (i - (len(values) - 1) / 2) for tick in range(len(ticks))]
            bars = [found.below, found.above] if any(found.above) else None
            axis.errorbar(at, found.means, yerr=bars, label=self.names[label], lw=1.4, ms=5, **BAR, **self.look[label])
        axis.set_xticks(range(len(ticks)), ticks, rotation=90 if turned else 0)
        axis.grid(axis="y", color="0.9", lw=0.7)
        return figure, axis

    def matrices(self) -> Any:
        """The accuracy matrices, mean over seeds."""
        rows, size = self.rows[:MATRICES], len(self.tasks)
        most = 4 if size <= 5 else 3 if size <= 8 else 2
        columns, lines = min(len(rows), most), -(-len(rows) // most)
        wide = max(6.8 / most, 2.6 if columns == 1 else 0.0)
        shape = (wide * columns + 0.9, lines * (wide + 0.4 * (lines > 1)) + 0.4)
        figure, axes = new_figure(*shape, lines, columns, fixed=True)
        for axis in axes.flat[len(rows) :]:
            axis.set_axis_off()
        all_rows = [row for table in self.tables for row in table.rows[:MATRICES]]
        top = top_of_scale([value for row in all_rows for values in series.mean_matrix(row) for value in values])
        for axis, row in zip(axes.flat, rows, strict=False):
            R, step = series.mean_matrix(row), -(-size // 10)
            shown = heat(axis, R, top, 0 if size <= 10 else -1)
            title = [*textwrap.wrap(self.names[row.label], TITLE), f"average {row.mean(ACCURACY):.1f}"]
            axis.set_title("\n".join(title), fontsize=SMALL)
            axis.set_xticks(range(0, size, step), self.tasks[::step])
            axis.set_yticks(range(0, len(R), step), ["all"] if row.first.joint else self.tasks[: len(R) : step])
        for axis in axes.flat[max(0, len(rows) - columns) : len(rows)]:
            axis.set_xlabel("tested on task", fontsize=NORMAL)
        for axis in axes[:, 0]:
            axis.set_ylabel("after task", fontsize=NORMAL)
        bar = figure.colorbar(shown, ax=axes, shrink=0.8 if lines > 1 else 1.0, pad=0.02)
        bar.set_label("top-1 accuracy (%)", fontsize=NORMAL)
        bar.ax.tick_params(labelsize=SMALL)
        return figure

    def accuracy_over_tasks(self) -> Any:
        """Mean accuracy on the tasks seen so far, after each task."""
        rows = self.rows[:LINES]
        values = series.accuracies(rows)
        if not values or len(self.tasks) < 2:
            return None
        figure, axis = self.lines(values, self.tasks)
        for row in rows:
            if row.first.joint:
                look = {"color": self.look[row.label]["color"], "label": self.names[row.label]}
                axis.axhline(row.mean(ACCURACY), ls=":", **look)
        joint = self.of_all(LINES, lambda rows: filter(None, (accuracy(row) for row in rows)))
        set_limits(axis, "y", [*joint, *self.of_all(LINES, lambda rows: iter(series.accuracies(rows).values()))])
        axis.set_xlabel("after task", fontsize=NORMAL)
        axis.set_ylabel("mean top-1 accuracy on the tasks seen (%)", fontsize=NORMAL)
        legend(axis)
        return figure

    def space_shift(self) -> Any:
        """RMSE between the quantized weights at the ends of two tasks, mean over pairs of tasks, layer by layer."""
        layers, values = series.shifts(self.rows[:LINES])
        if not values:
            return None
        figure, axis = self.lines(values, layers, turned=True)
        set_limits(axis, "y", self.of_all(LINES, lambda rows: iter(series.shifts(rows)[1].values())), log=True)
        axis.set_xlabel("layer", fontsize=NORMAL)
        axis.set_ylabel("space shift (RMSE of quantized weights)", fontsize=NORMAL)
        legend(axis)
        return figure

    def quantization_error(self) -> Any:
        """The last model's quantization error on each former task over that of the model of that task, xi(s,T)/xi(s,s),
        geometric mean over seeds. The paper proves at least 1."""
        values = series.growths(self.rows[:LINES])
        if not values:
            return None
        figure, axis = self.lines(values, self.tasks[:-1])
        axis.axhline(1, color="0.4", lw=1, ls="--")
        set_limits(axis, "y", [1, *self.of_all(LINES, lambda rows: iter(series.growths(rows).values()))], log=True)
        axis.set_xlim(-0.2, len(self.tasks) - 1.8)
        axis.set_xlabel("former task", fontsize=NORMAL)
        axis.set_ylabel("quantization error, last model / task's own", fontsize=NORMAL)
        legend(axis)
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
        figure, axes = new_figure(
            WIDE, max(2.8, 1.3 * len(rows) + 0.9), len(rows), len(layers), sharex="col", sharey=True
        )
        for line, row in zip(axes, rows, strict=True):
            for axis, layer in zip(line, layers, strict=True):
                found = row.first.results["code_histograms"][layer]
                total = max(1, sum(found["counts"]))
                codes = range(found["first_code"], found["first_code"] + len(found["counts"]))
                heights = [100 * count / total for count in found["counts"]]
                axis.bar(codes, heights, width=0.9, color=self.look[row.label]["color"])
                axis.set_title(f"{self.names[row.label]}: {layer.removesuffix('.weight_quant')}", fontsize=SMALL)
        axes[0][0].set_ylim(bottom=0)  # of all of them
        for axis in axes[-1]:
            axis.set_xlabel("code of a weight", fontsize=NORMAL)
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.supylabel("share of the layer's weights (%)", fontsize=NORMAL)
        return figure

    def points(self, x: Callable, y: Callable, words: tuple[str, str], log: bool = False) -> Any:
        """A point for each row, with its deviations over seeds. The legend beside has the order of the points, from the top."""
        found = {row.label: (a, b) for row in self.rows[:POINTS] if (a := x(row)) and (b := y(row))}
        if not found:
            return None
        figure, axes = new_figure(WIDE, max(3.8, 0.18 * len(found) + 0.9))
        axis = axes[0][0]
        for label, (a, b) in sorted(found.items(), key=lambda item: -item[1][1].means[0]):
            bars = {f"{side}err": [of.below, of.above] for side, of in (("x", a), ("y", b)) if any(of.above)}
            axis.errorbar(a.means, b.means, **bars, ls="", ms=7, label=self.names[label], **BAR, **self.look[label])
        for side, of, logarithmic in (("x", x, log), ("y", y, False)):
            shown = self.of_all(POINTS, lambda rows, of=of: filter(None, map(of, rows)))
            set_limits(axis, side, shown, logarithmic)
        axis.set_xlabel(words[0], fontsize=NORMAL)
        axis.set_ylabel(words[1], fontsize=NORMAL)
        axis.grid(color="0.92", lw=0.7)
        axis.set_axisbelow(True)
        legend(axis)
        return figure

    def forgetting_and_bytes(self) -> Any:
        """What is kept (the packed model and all else between tasks) against what is forgotten."""
        return self.points(
            kilobytes, forgetting, ("kept between tasks, with the packed model (kB)", "forgetting (points)"), True
        )

    def accuracy_over_bytes(self) -> Any:
        """Average accuracy over what is kept between tasks (the packed model and all else), a line for each method."""
        alike = [table for table in self.tables if table.kind == self.table.kind]
        values = series.over_budgets(alike, ACCURACY)
        if not values or self.table is not alike[0]:
            return None
        figure, axes = new_figure(WIDE, 4.2)
        axis = axes[0][0]
        for i, (label, (kept, found)) in enumerate(sorted(values.items(), key=lambda item: -item[1][1].means[-1])):
            bars = [found.below, found.above] if any(found.above) else None
            look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
            axis.errorbar(kept, found.means, yerr=bars, label=label, lw=1.6, ms=6, **BAR, **look)
        set_limits(axis, "x", [end for kept, _ in values.values() for end in kept], log=True)
        set_limits(axis, "y", [end for _, found in values.values() for end in found.ends])
        axis.set_xlabel("kept between tasks, with the packed model (kB)", fontsize=NORMAL)
        axis.set_ylabel("average accuracy (%)", fontsize=NORMAL)
        axis.grid(color="0.92", lw=0.7)
        legend(axis)
        return figure

    def time_and_accuracy(self) -> Any:
        """Training time an image against average accuracy."""
        return self.points(milliseconds, accuracy, ("training time of an image (ms)", "average accuracy (%)"))


PICTURES = (
    (Painter.matrices, MATRICES),
    (Painter.accuracy_over_tasks, LINES),
    (Painter.forgetting_and_bytes, POINTS),
    (Painter.accuracy_over_bytes, POINTS),
    (Painter.space_shift, LINES),
    (Painter.quantization_error, LINES),
    (Painter.code_histograms, BARS),
    (Painter.time_and_accuracy, POINTS),
)
WITHOUT_BARS = (Painter.matrices, Painter.code_histograms)


def draw(table: Table, tables: Sequence[Table], out: Path) -> Iterator[tuple[str, str]]:
    """Write the table's pictures into ``out``; ``tables`` are all of the report. Returns (file name, caption) of each."""
    painter = Painter(table, tables)
    seeds = max(len(row.runs) for row in table.rows)
    for paint, room in PICTURES:
        figure = paint(painter)
        if figure is None:
            continue
        name = f"{paint.__name__}_{table.name}.png"
        figure.savefig(out / name, metadata={"Software": None})
        caption = " ".join(paint.__doc__.split())
        if seeds > 1 and paint not in WITHOUT_BARS:
            caption += " Bars: the standard deviation over seeds."
        if len(table.rows) > room:
            caption += f" The {room} rows of {len(table.rows)} with the best average accuracy."
        yield name, caption
