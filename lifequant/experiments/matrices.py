"""Draw the accuracy matrices of runs side by side.

python scripts/plot_matrices.py experiment/quickstart/original experiment/quickstart/ours --out docs/matrices.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lifequant.common.arguments import Parser
from lifequant.common.errors import UserError, one_line
from lifequant.experiments.result_files import read_all


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
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is missing: pip install lifequant[plot]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(3.6 * len(runs), 3.5), squeeze=False, layout="constrained")
    for axis, (name, results) in zip(axes[0], runs.items(), strict=True):
        matrix, ids = results["top1"], [task["id"] for task in results["tasks"]]
        shown = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                axis.text(
                    column, row, f"{value:.1f}", ha="center", va="center", color="white" if value > 60 else "black"
                )
        forgetting = "" if results["forgetting"] is None else f", forgetting {results['forgetting']:.1f}"
        axis.set_title(f"{one_line(name)}\naverage {results['average_accuracy']:.1f} %{forgetting}", fontsize=10)
        axis.set_xticks(range(len(ids)), [f"task {id}" for id in ids])
        rows = [f"after {id}" for id in ids] if len(matrix) == len(ids) else ["after all"]
        axis.set_yticks(range(len(matrix)), rows)
        axis.set_xlabel("tested on")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, label="top-1 (%)", shrink=0.8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(f"wrote {one_line(out)}")
    return 0
