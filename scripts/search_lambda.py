"""Find each penalty's default strength on held-out training images; the test images are never read.

Training images of each task are split: 80 % are trained on, 20 % stand where the test images would. All runs of a seed
share task 0 (--start_task 1). Writes a Markdown table: average accuracy and forgetting on the held-out images.

    python scripts/search_lambda.py --data_dir data_dir/cifar10 --work experiment/lambda --out docs/lambda_search.md
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

if find_spec("lifequant") is None:  # a bare clone that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lifequant.cli import Parser, run_main, whole
from lifequant.errors import UserError
from lifequant.files import write_all
from lifequant.generate import checked_tasks, csv_files, folder_images, rows_of_tasks
from lifequant.options import make
from lifequant.split import lowest
from lifequant.task_csv import Rows
from lifequant.train import run

GRID = {
    "none": (0.0,),
    "proxq": (3.0, 10.0, 30.0, 100.0),
    "proxq_step": (0.03, 0.1, 0.3, 1.0),
    "proxq_published": (10.0, 30.0, 100.0),
}
TASKS, HELD_OUT = 3, 0.2


def write_csvs(
    data_dir: Path, folder: Path, per_class: int, seed: int, num_tasks: int = TASKS, held_out: float = HELD_OUT
) -> None:
    """Task CSVs whose "test" images are held-out training images, a share of ``per_class`` ones."""
    names, rows = folder_images(data_dir, data_dir, "train")
    tasks = checked_tasks(len(names), num_tasks, 1.0, seed)
    rows = _pick(rows, per_class, seed, "thin")
    held = set(_pick(rows, round(per_class * held_out), seed, "lambda_search"))
    train = rows_of_tasks([row for row in rows if row not in held], tasks)
    test = rows_of_tasks([row for row in rows if row in held], tasks)
    files = csv_files("search", "train", train) | csv_files("search", "test", test)
    write_all({folder / name: text for name, text in files.items()})


def _pick(rows: Rows, n: int, seed: int, purpose: str) -> Rows:
    labels = [label for _, label in rows]
    return [rows[i] for i in lowest([image for image, _ in rows], labels, dict.fromkeys(labels, n), seed, purpose)]


def main(argv: list[str]) -> int:
    parser = Parser(description="Search each penalty's strength on held-out training images.")
    parser.add_argument("--data_dir", required=True, help="folder with train/<class>/*")
    parser.add_argument("--out", required=True, help="the table, Markdown")
    parser.add_argument("--work", required=True, help="folder of the runs; those that are finished are not run again")
    parser.add_argument("--penalties", nargs="+", choices=list(GRID), default=list(GRID), help="forms to search")
    parser.add_argument("--images_per_class", type=whole(10), default=500, help="of which 20 % are held out")
    parser.add_argument("--num_epochs", type=whole(1), default=6, help="epochs a task")
    parser.add_argument("--train_batch_size", type=whole(2), default=32, help="images a step")
    parser.add_argument("--bits", type=whole(2), default=4, help="of weights and activations")
    parser.add_argument("--seeds", nargs="+", type=whole(0), default=[0], help="seeds to average over")
    args = parser.parse_args(argv)
    words = (Path(word).name if Path(word).is_absolute() else word for word in argv)
    command = "python scripts/search_lambda.py " + " ".join(words)
    cells: dict[tuple[str, float], list[tuple[float, ...]]] = {}
    for seed in args.seeds:
        search_seed(args, Path(args.work) / str(seed), seed, cells)
    lines = [
        "# The strength of ProxQ's penalty",
        "",
        f"`{command}`: {args.bits} bits, {args.images_per_class} training images a class of {args.data_dir.rstrip('/').split('/')[-1]}, of which",
        f"{HELD_OUT:.0%} are held out and scored; {TASKS} disjoint tasks, {args.num_epochs} epochs each, batch {args.train_batch_size}, replay 20 %, seeds {args.seeds}.",
        "No test image was read. In percent, mean over seeds.",
        "",
        "| penalty | lambda | average accuracy | newest task | forgetting |",
        "|---|---|---|---|---|",
    ]
    for (penalty, strength), values in cells.items():
        mean = np.mean(values, axis=0)
        lines.append(
            f"| {penalty} | {strength:g} | "
            + " | ".join("diverged" if np.isnan(v) else f"{v:.2f}" for v in mean)
            + " |"
        )
    Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


def search_seed(args: argparse.Namespace, work: Path, seed: int, cells: dict) -> None:
    """All runs of a seed: one float model of task 0, one quantized task 0, then every penalty and strength."""
    write_csvs(Path(args.data_dir), work / "csv", args.images_per_class, seed)
    common = {
        "train_batch_size": args.train_batch_size,
        "csv_dir": work / "csv",
        "data_dir": args.data_dir,
        "num_epochs": args.num_epochs,
        "seed": seed,
        "compile": "on",
        "resume": "True",
    }
    run(make(method="original", bitW=32, num_tasks=1, job_dir=work / "float", **common))
    common |= {"method": "ours", "bitW": args.bits, "source_file": work / "float" / "model_best.pt"}
    run(make(penalty="none", job_dir=work / "task0", **common))
    for penalty in args.penalties:
        for strength in GRID[penalty]:
            job = work / f"{penalty}_{strength:g}"
            fork = {"start_task": 1, "from_run": work / "task0"}
            try:
                results = run(make(penalty=penalty, ll_lambda=strength, job_dir=job, **fork, **common))
                values = results["average_accuracy"], results["top1"][-1][-1], results["forgetting"]
            except UserError as error:  # it diverged: a row of its own, "diverged" in the table
                print(error)
                values = (np.nan,) * 3
            cells.setdefault((penalty, strength), []).append(values)


if __name__ == "__main__":
    sys.exit(run_main(main))
