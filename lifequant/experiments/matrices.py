"""Draw the accuracy matrices of runs side by side.

python scripts/plot_matrices.py experiment/quickstart/original experiment/quickstart/ours --out docs/matrices.png
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lifequant.common.arguments import Parser
from lifequant.common.errors import UserError, one_line
from lifequant.experiments.plotting import NORMAL, SMALL, heat, new_figure, top_of_scale
from lifequant.experiments.result_files import read_all


def drawn(runs: dict[str, dict[str, Any]]) -> Any:
    """The figure: a matrix for each {name: results}, with the same colors in all."""
    top = top_of_scale([value for results in runs.values() for row in results["top1"] for value in row])
    figure, axes = new_figure(3.4 * len(runs) + 0.9, 3.9, 1, len(runs), fixed=True)
    for axis, (name, results) in zip(axes[0], runs.items(), strict=True):
        matrix, ids = results["top1"], [task["id"] for task in results["tasks"]]
        shown = heat(axis, matrix, top, 1 if len(ids) <= 8 else -1, NORMAL)
        forgetting = "" if results["forgetting"] is None else f", forgetting {results['forgetting']:.1f} points"
        title = f"{one_line(name)}\naverage {results['average_accuracy']:.1f} %{forgetting}"
        axis.set_title(title.replace("$", r"\$"), fontsize=NORMAL)
        step = -(-len(ids) // 10)
        axis.set_xticks(range(0, len(ids), step), ids[::step])
        axis.set_yticks(range(0, len(matrix), step), ids[::step] if len(matrix) == len(ids) else ["all"])
        axis.set_xlabel("tested on task", fontsize=NORMAL)
    axes[0][0].set_ylabel("after task", fontsize=NORMAL)
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("top-1 accuracy (%)", fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def main(argv: Sequence[str]) -> int:
    """Draw the picture. Raises UserError."""
    parser = Parser(description="Draw the accuracy matrices of runs by their results.json.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its results.json")
    parser.add_argument("--out", default="matrices.png", help="the picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    runs = read_all(args.runs)
    out = Path(args.out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {out}: give a name that ends in .png, .svg or .pdf")
    if find_spec("matplotlib") is None:
        raise UserError("matplotlib is missing: pip install lifequant[plot]")
    figure = drawn(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    print(f"wrote {one_line(out)}")
    return 0
