"""A table of trained runs in every exported form: integer convolutions, equal predictions, accuracy, bytes.

python scripts/measure_export.py RUN [RUN ...] [--out docs/export_table.md]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import Parser, run_main
from lifequant.exporting import run
from lifequant.exporting.command import check_onnx, images_of
from lifequant.exporting.trained import load_trained

FORMS = (("fast", "int8"), ("exact", "int8"), ("exact", "int4"))


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a job_dir")
    parser.add_argument("--images", metavar="DIR", help="images to check with, where not the run's")
    parser.add_argument("--out", metavar="FILE", help="write the table here, too")
    args = parser.parse_args(argv)
    run.needed("onnx", "onnxruntime", "onnxscript", "torch")
    lines = [
        "| quantizer | bits | form | weights | convolutions: integer, float | equal predictions (%) | top-1 here, in the file (%) | bytes | rounded, or in float |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    for folder in args.runs:
        source = load_trained(Path(folder), None)
        images = images_of(source, args.images)
        for form, weights in FORMS:
            made, parity = check_onnx(source, images, form, weights)
            whole, in_float = run.convolutions(run.kernels(made.content))
            tops = "-" if parity.accuracy is None else "{:.2f}, {:.2f}".format(*parity.accuracy)
            cells = (
                source.settings["quantizer"], source.settings["bitW"], form, weights, f"{whole}, {in_float}",
                f"{parity.equal:.2f}", tops, f"{len(made.content):,}", "; ".join(note.split(":")[0] for note in made.notes),
            )  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], flush=True)
    if args.out:
        checkpoint.write_bytes(Path(args.out), ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    sys.exit(run_main(main))
