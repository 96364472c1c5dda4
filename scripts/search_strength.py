"""Find each method's default strength on held-out training images; the test images are never read.

    python scripts/search_strength.py --data_dir data_dir/cifar10 --work experiment/strength --jobs 2

Of the training images some are trained on, as many others stand where the test images would. Chosen is the best mean:
of the average accuracy where there is replay, of the task-masked accuracy where there is none. Writes
lifequant/methods/strength.json: the command, the protocol, every value that was tried and what came of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from _runs import run_all
from search_lambda import write_csvs

from lifequant.cli import Parser, real, run_main, whole

LAMBDA = "ll_lambda"
GRID: dict[str, tuple[str, tuple[float, ...]]] = {
    "ewc": (LAMBDA, (10, 100, 1000, 10000)),
    "online_ewc": (LAMBDA, (10, 100, 1000)),
    "si": (LAMBDA, (0.1, 1, 10, 100)),
    "mas": (LAMBDA, (0.01, 0.1, 1, 10)),
    "rwalk": (LAMBDA, (1, 10, 100, 1000)),
    "scp": (LAMBDA, (0.1, 1, 10, 100)),
    "lwf": ("lwf_alpha", (0.3, 1, 3)),
    "derpp": ("derpp_alpha", (0.1, 0.5, 2)),
}
RATES = {"original": (0.04, 0.01, 0.0025), "replay": (0.04, 0.01, 0.0025)}
FILE = Path(__file__).resolve().parents[1] / "lifequant" / "methods" / "strength.json"


def main(argv: list[str]) -> int:
    parser = Parser(description="Search each method's strength on held-out training images.")
    parser.add_argument("--data_dir", required=True, help="folder with train/<class>/*")
    parser.add_argument("--work", required=True, help="folder of the runs; those that are finished are not run again")
    parser.add_argument("--out", default=str(FILE), help="the table, JSON")
    parser.add_argument(
        "--rates", action="store_true", help="search the learning rate instead, without protection and with replay"
    )
    parser.add_argument("--methods", nargs="+", choices=list(GRID), default=list(GRID), help="methods to search")
    parser.add_argument(
        "--images_per_class", type=whole(10), default=100, help="to train on; as many others are held out"
    )
    parser.add_argument("--num_tasks", type=whole(2), default=5, help="disjoint tasks")
    parser.add_argument("--num_epochs", type=whole(1), default=12, help="epochs a task")
    parser.add_argument("--image_size", type=whole(8), default=16, help="pixels a side; 32 costs four times as much")
    parser.add_argument("--train_batch_size", type=whole(2), default=16, help="images a step")
    parser.add_argument("--lr", type=real(above=0), default=0.0025, help="learning rate")
    parser.add_argument("--seeds", nargs="+", type=whole(0), default=[0], help="seeds to average over")
    parser.add_argument("--jobs", type=whole(1), default=1, help="runs at a time")
    args = parser.parse_args(argv)
    tried = [("lr", name, value) for name, values in RATES.items() for value in values]
    if not args.rates:
        tried = [(GRID[name][0], name, value) for name in args.methods for value in GRID[name][1]]
    runs: dict[tuple[str, str, float, int], dict[str, Any]] = {}
    for seed in args.seeds:
        work = Path(args.work) / str(seed)
        write_csvs(Path(args.data_dir), work / "csv", 2 * args.images_per_class, seed, args.num_tasks, 0.5)
        common = {
            name: getattr(args, name) for name in ("data_dir", "num_epochs", "train_batch_size", "lr", "image_size")
        }
        common |= {"csv_dir": work / "csv", "seed": seed, "quantizer": "lsq", "bitW": 4, "compile": "off"}
        for flag, name, value in tried:
            job = work / f"{name}_{flag}_{value:g}"
            runs[flag, name, value, seed] = {**common, "method": name, flag: value, "job_dir": job}
    results = run_all(list(runs.values()), args.jobs)
    rows = []
    for flag, name, value in tried:
        found = [results[str(runs[flag, name, value, seed]["job_dir"])] for seed in args.seeds]
        rows.append({"method": name, "flag": flag, "value": value, **({} if None in found else scores(found))})
    words = (Path(word).name if Path(word).is_absolute() else word for word in argv)
    record = {
        "what": f"a small search, for orientation: one protocol, {len(args.seeds)} seed(s), held-out training images",
        "command": "python scripts/search_strength.py " + " ".join(words),
        "protocol": f"CIFAR-10 sample, {args.images_per_class} training images a class and as many held-out ones, "
        f"{args.image_size} pixels a side, {args.num_tasks} disjoint tasks, {args.num_epochs} epochs each, batch {args.train_batch_size}, lsq at 4 bits",
        "chosen": {
            name: best([row for row in rows if row["method"] == name])
            for name in dict.fromkeys(r["method"] for r in rows)
        },
        "tried": rows,
    }
    text = json.dumps(record, indent=1)
    Path(args.out).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def scores(found: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds, in percent."""
    return {
        "average_accuracy": round(mean(r["average_accuracy"] for r in found), 2),
        "task_masked": round(mean(mean(r["top1_masked"][-1]) for r in found), 2),
        "newest_task_masked": round(mean(r["top1_masked"][-1][-1] for r in found), 2),
        "forgetting": round(mean(r["forgetting"] for r in found), 2),
        "replay": max(r["memory_bytes"]["replay"] for r in found) > 0,
    }


def best(rows: list[dict[str, Any]]) -> float | None:
    """The value with the best score among the runs that did not diverge."""
    scored = [row for row in rows if "replay" in row]
    key = "average_accuracy" if any(row["replay"] for row in scored) else "task_masked"
    return max(scored, key=lambda row: row[key])["value"] if scored else None


if __name__ == "__main__":
    sys.exit(run_main(main))
