"""What each part of LifeQuant does: original, replay, joint, ours, and ours without each of its parts, in one table.

Makes disjoint tasks of the images in --data_dir, a 32-bit model of task 0, and one run a row from it into --out. A run
that is finished is not run again, so the command can be repeated after an interruption.

    python scripts/ablation.py --data_dir data_dir/cifar10 --images_per_class 500 --out experiment/ablation
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from _results import read
from compare import mean_shift, number

from lifequant.cli import Parser, run_main, whole
from lifequant.generate import main_tasks
from lifequant.options import make
from lifequant.train import run

ROWS = {
    "original": {"method": "original"},
    "replay": {"method": "replay"},
    "ours": {"method": "ours"},
    "ours, without the projection": {"method": "ours", "quantizer": "lsq"},
    "ours, without the penalty": {"method": "ours", "penalty": "none"},
    "ours, without BaLL's loss": {"method": "ours", "loss": "ce"},
    "ours, without BaLL's sampler": {"method": "ours", "sampler": "uniform"},
    "ours, proxq_step": {"method": "ours", "penalty": "proxq_step"},
    "ours, --preset paper": {"method": "ours", "preset": "paper"},
    "joint": {"method": "joint"},
}
HEAD = (
    "| run | average | newest task | task-masked | forgetting | space shift | xi(s,T)/xi(s,s) | kB kept |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str]) -> int:
    parser = Parser(description="Run LifeQuant with and without its parts.")
    parser.add_argument("--data_dir", required=True, help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--out", required=True, help="folder of the runs and of table.md")
    parser.add_argument("--images_per_class", type=whole(1), default=500, help="training images")
    parser.add_argument("--num_epochs", type=whole(1), default=6, help="epochs a task")
    parser.add_argument("--train_batch_size", type=whole(2), default=32, help="images a step")
    parser.add_argument("--bits", nargs="+", type=whole(2), default=[4, 2], help="of weights and activations")
    parser.add_argument("--seed", type=whole(0), default=0, help="of classes, images and training")
    args = parser.parse_args(argv)
    out = Path(args.out)
    split = ["--data_dir", args.data_dir, "--output_csv", "images.csv", "--output_dir", str(out / "csv")]
    split += ["--num_tasks", "3", "--diminish_rate", "100", "--seed", str(args.seed)]
    main_tasks([*split, "--source", "train", "--images_per_class", str(args.images_per_class)])
    main_tasks([*split, "--source", "test"])
    common = {name: getattr(args, name) for name in ("data_dir", "num_epochs", "train_batch_size", "seed")}
    common |= {"csv_dir": out / "csv", "resume": "True", "compile": "on"}
    source = out / "float"
    run(make(method="original", bitW=32, num_tasks=1, job_dir=source, **common))
    common |= {"source_file": source / "model_best.pt"}
    for bits in args.bits:
        for name, settings in ROWS.items():
            run(make(**settings, bitW=bits, job_dir=out / f"{bits}bit" / folder_name(name), **common))
    text = "\n\n".join(table(out, bits) for bits in args.bits)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 0


def folder_name(row: str) -> str:
    return row.replace("ours, ", "ours_").replace("without the ", "no_").replace("without ", "no_").replace(" ", "_")


def table(out: Path, bits: int) -> str:
    """Markdown. The newest task is the last row's last entry; xi's ratio is the mean over former tasks s."""
    lines = [f"{bits} bits", "", HEAD]
    for name in ROWS:
        results = read(str(out / f"{bits}bit" / folder_name(name)))[1]
        last, xi = results["top1"][-1], results["quantization_error"]
        masked = results["top1_masked"][-1]
        growth = [xi[-1][s] / xi[s][s] for s in range(len(xi) - 1)]
        cells = [
            number(results["average_accuracy"]),
            number(last[-1]),
            number(sum(masked) / len(masked)),
            number(results["forgetting"]),
            number(mean_shift(results["space_shift"]), 4),
            number(sum(growth) / len(growth) if growth else None),
            number(sum(results["memory_bytes"].values()) / 1000, 0),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main))
