"""What all pictures share: figures with margins, axes with limits, matrices. matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDE, DPI = 7.6, 110  # inches, and pixels an inch: 836 pixels, what a README shows
MARGIN = 0.1  # inches
TOPS = (1, 2, 5, 10, 20, 30, 40, 50, 60, 80, 100)  # where a scale of percents may end
SMALL, NORMAL = 8, 9  # points


def new_figure(
    wide: float, high: float, rows: int = 1, columns: int = 1, fixed: bool = False, **kwargs: Any
) -> tuple[Any, Any]:
    """(figure, axes [rows, columns]); sizes in inches. ``fixed``: the axes keep their shape, as those of matrices do."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), dpi=DPI, layout="compressed" if fixed else "constrained")
    figure.get_layout_engine().set(w_pad=MARGIN, h_pad=MARGIN)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.tick_params(labelsize=SMALL)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def top_of_scale(percents: Sequence[float]) -> float:
    """Where a color scale ends that shows these percents: the next round number."""
    return next((top for top in TOPS if top >= max(percents, default=100)), 100)


def heat(axis: Any, matrix: Sequence[Sequence[float]], top: float, digits: int, size: int = SMALL) -> Any:
    """Draw a matrix of percents from 0 to ``top``, its numbers in its cells (none for ``digits`` < 0). Returns the image."""
    shown = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=top)
    for t, values in enumerate(matrix if digits >= 0 else []):
        for i, value in enumerate(values):
            color = "white" if value > 0.6 * top else "black"
            axis.text(i, t, f"{value:.{digits}f}", ha="center", va="center", color=color, fontsize=size)
    if len(matrix) == 1:  # as high as the matrices beside it
        axis.set_ylim(len(matrix[0]) / 2, -len(matrix[0]) / 2)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return shown


def set_limits(axis: Any, side: str, values: Sequence[float], log: bool = False) -> None:
    """Show all ``values``, with room on both ends. With ``log``, and more than a factor of 5 between them, the axis is
    logarithmic with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(values), max(values)
    if log and low > 0 and high > 5 * low:
        getattr(axis, f"set_{side}scale")("log")
        ticks = getattr(axis, f"{side}axis")
        ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ticks.set_minor_formatter(NullFormatter())
        room = (high / low) ** 0.08
        getattr(axis, f"set_{side}lim")(low / room, high * room)
    else:
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        getattr(axis, f"set_{side}lim")(low - room, high + room)


def legend(axis: Any) -> None:
    """Name what is drawn, beside the axes."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=SMALL, frameon=False)
