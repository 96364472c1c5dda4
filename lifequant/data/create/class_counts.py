"""How many training images of each class a task has, and the rebalancing weights that follow (reweight_<task>.json).

A training run computes these weights itself, from all it trains on (replay too), and reads no such file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

import torch

from lifequant.common.arguments import Parser, int_at_least
from lifequant.common.commands import command
from lifequant.common.errors import one_line
from lifequant.common.files import find_folder, write_all
from lifequant.data.task_csv import choose_prefix, choose_tasks, csv_name, read_rows
from lifequant.losses import rebalancing_weights


def main_counts(argv: Sequence[str]) -> int:
    """count_classes.py: prints a table, writes reweight_0.json, ... beside the CSVs. Raises UserError."""
    parser = Parser(description="Count each task's classes and write their weights.")
    parser.add_argument("--data_dir", default=".", help="folder that has the task CSVs")
    parser.add_argument("--data_csv", "--output_csv", metavar="NAME.csv", help="the data set, where there are several")
    parser.add_argument("--num_tasks", type=int_at_least(1), help="tasks to count (default: all)")
    args = parser.parse_args(argv)

    folder = find_folder(args.data_dir, "--data_dir", f"give the folder that this wrote: {command('tasks')}")
    prefix = choose_prefix(folder, args.data_csv)
    num_tasks = choose_tasks(folder, prefix, args.num_tasks)
    counts = [Counter(label for _, label in read_rows(folder / csv_name(prefix, "train", t))) for t in range(num_tasks)]
    weights = [weights_of(count) for count in counts]
    write_all({folder / f"reweight_{task}.json": json.dumps(w, indent=1) + "\n" for task, w in enumerate(weights)})

    print(f"task CSVs: {one_line(folder / prefix)}_train0.csv to {num_tasks - 1}")
    print("task  classes   images  fewest    most  a class; weights from    to")
    for task, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        low, high = min(count.values()), max(count.values())
        print(f"{task:4} {len(count):8} {count.total():8} {low:7} {high:7}", end="")
        print(f"{min(weight.values()):24.3f} {max(weight.values()):.3f}  reweight_{task}.json")
    return 0


def weights_of(counts: dict[int, int]) -> dict[str, float]:
    """{label: rebalancing weight} of the classes present."""
    labels = sorted(counts)
    weights = rebalancing_weights(torch.tensor([counts[label] for label in labels], dtype=torch.float64))
    return {str(label): weight for label, weight in zip(labels, weights.tolist(), strict=True)}
