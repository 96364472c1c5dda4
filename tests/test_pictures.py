"""The report's pictures: bars are deviations, axes are the same in all tables, and no text touches another or an edge."""

from __future__ import annotations

import itertools
import statistics

import pytest
from test_report import results

from lifequant.experiments import matrices, pictures, rows

pytest.importorskip("matplotlib", reason="matplotlib is missing (extra plot)")
from matplotlib.text import Text

EDGE = 8  # pixels that stay free


def runs(label: str, accuracies: list[float], **config) -> list[rows.Run]:
    found = [results(seed, accuracy, shift=0.01 * (1 + seed), **config) for seed, accuracy in enumerate(accuracies)]
    return [rows.Run(label, label, run) for run in found]


@pytest.fixture(scope="module")
def painters() -> list[pictures.Painter]:
    """A picture of twelve rows at 4 bits, one of them joint, and one of a single row at 2 bits."""
    found = [run for i in range(11) for run in runs(f"a rather long name, row {i}", [9 + i, 10, 11 + i], lr=1 + i)]
    for run in runs("a row with bytes and time of its own", [3.0, 4.0], lr=50.0):
        run.results.update(images_per_second=10.0 + run.seed, memory_bytes={"packed_model": 9, "replay": 10**6})
        found.append(run)
    joint = results(0, 12.0, method="joint") | {"top1": [[7.0, 9.0]], "top1_masked": [[7.0, 9.0]], "forgetting": None}
    found.append(
        rows.Run("joint", "joint", joint | {"space_shift": {"fc": [[0.0]]}, "quantization_error": [[1.0, 1.0]]})
    )
    tables = rows.tables(rows.group([*found, *runs("few bits", [2.0, 5.0], bitW=2, abitW=2)]))
    return [pictures.Painter(table, tables) for table in tables]


def figures(painters) -> list:
    drawn = [paint(painter) for painter in painters for paint, _ in pictures.PICTURES]
    return [figure for figure in drawn if figure is not None]


def out_of_view(figure) -> set[int]:
    """The labels of ticks beyond an axis' ends, which are not drawn."""
    sides = [side for axis in figure.axes for side in (axis.xaxis, axis.yaxis)]
    ticks = [(tick, sorted(side.get_view_interval())) for side in sides for tick in side.get_major_ticks()]
    return {id(tick.label1) for tick, (low, high) in ticks if not low <= tick.get_loc() <= high}


def texts(figure) -> list:
    """(words, its box in pixels) of all that can be read."""
    figure.draw_without_rendering()
    hidden = out_of_view(figure)
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and id(text) not in hidden]
    return [(text.get_text(), box) for text in found if (box := text.get_window_extent()).width > 0]


def test_no_text_touches_another_or_an_edge(painters):
    drawn = [*figures(painters), matrices.drawn({"a run": results(0), "a second run": results(1, 3.0)})]
    assert len(drawn) == 15
    for figure in drawn:
        found = texts(figure)
        for words, box in found:
            inside = box.x0 >= EDGE and box.y0 >= EDGE
            assert inside and box.x1 <= figure.bbox.x1 - EDGE and box.y1 <= figure.bbox.y1 - EDGE, words
        for (words, box), (other, its) in itertools.combinations(found, 2):
            assert not box.overlaps(its), (words, other)


def test_bars_are_deviations(painters):
    figure = painters[0].forgetting_and_bytes()
    row = next(row for row in painters[0].rows if row.label == "a rather long name, row 4")
    (bar,) = [c for c in figure.axes[0].containers if c.get_label() == painters[0].names[row.label]]
    ((x, low), (_, high)) = bar.lines[2][0].get_segments()[0]
    spread = statistics.stdev([80 - 13, 80 - 10, 80 - 15])
    assert (low, high) == pytest.approx((80 - 38 / 3 - spread, 80 - 38 / 3 + spread)) and x == 3.5


def test_a_line_over_budgets():
    """Each budget has a table where all rows have a budget, and the first of them draws a line over all."""
    found = []
    for budget, kilobytes in ((500_000, 499), (200_000, 200), (1_000_000, 990)):
        for row, accuracies in (("ours", [kilobytes / 10, kilobytes / 10 + 4]), ("replay", [kilobytes / 20])):
            for run in runs(f"deep/{row}/memory_budget{budget}", accuracies, memory_budget=budget, lr=len(row)):
                run.results["memory_bytes"] = {"packed_model": 100_000, "replay": 1000 * kilobytes - 100_000}
                found.append(run)
    tables = rows.tables(rows.group(found))
    (together,) = rows.tables(rows.group([*found, *runs("plain", [20.0])]))
    assert len(together.rows) == 7 and together.name == "4bit"
    assert [t.name for t in tables] == ["4bit_200kB", "4bit_500kB", "4bit_1000kB"]
    assert tables[2].bits == "4 bits, 1,000 kB in all" and [len(t.rows) for t in tables] == [2, 2, 2]
    drawn = [pictures.Painter(table, tables).accuracy_over_bytes() for table in tables]
    assert [figure is not None for figure in drawn] == [True, False, False]
    ours, replay = drawn[0].axes[0].containers
    assert (ours.get_label(), replay.get_label()) == ("deep/ours", "deep/replay")
    assert ours.lines[0].get_xydata().tolist() == [[200, 22], [499, pytest.approx(51.9)], [990, 101]]
    spread = statistics.stdev([20, 24])
    assert ours.lines[2][0].get_segments()[0][:, 1].tolist() == pytest.approx([22 - spread, 22 + spread])
    assert replay.lines[0].get_ydata().tolist() == pytest.approx([10, 24.95, 49.5]) and not replay.lines[2]
    assert drawn[0].axes[0].get_xscale() == "linear"  # a factor below 5


def test_axes_and_colors_are_the_same_in_all_tables(painters):
    for paint in (
        pictures.Painter.accuracy_over_tasks,
        pictures.Painter.forgetting_and_bytes,
        pictures.Painter.space_shift,
    ):
        one, other = (paint(painter).axes[0].get_ylim() for painter in painters)
        assert one == other, paint.__name__
    tops = {image.get_clim() for painter in painters for axis in painter.matrices().axes for image in axis.images}
    assert tops == {(0, 80)}


def test_colors_show_low_accuracies():
    """The scale ends at the next round number above the data."""
    low = results(0, 3.0) | {"top1": [[4.0, 0.0], [2.0, 3.0]]}
    assert matrices.drawn({"low": low}).axes[0].images[0].get_clim() == (0, 5)
