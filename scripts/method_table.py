"""Every method with lsq at 4 bits, every quantizer with replay at 4 and 2 bits: one protocol, one table.

    python scripts/method_table.py --data_dir data_dir/cifar10 --out experiment/methods --jobs 2

Disjoint tasks of two classes each, a quantized network from scratch. Finished runs are not run again, so the command
may be stopped and given again. Writes table.md; sort order: average accuracy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _runs import run_all
from compare import number

from lifequant import registry
from lifequant.cli import Parser, real, run_main, whole
from lifequant.generate import main_tasks

KINDS = ("packed_model", "replay", "importance", "reference", "logits")
HEAD = (
    "| {} | average | task-masked | forgetting | "
    + " | ".join(f"{kind.replace('packed_', '')} kB" for kind in KINDS)
    + " | images/s |\n|"
    + "---|" * (5 + len(KINDS))
)


def rows(table: str) -> dict[str, dict[str, Any]]:
    """{row: settings} of a table: "methods", or "quantizers" at a bit-width."""
    if table == "methods":
        return {name: {"method": name, "quantizer": "lsq", "bitW": 4} for name in registry.names("method")} | {
            "ours with proxq": {"method": "ours", "bitW": 4}
        }
    names = registry.names("quantizer")
    marked = {name: name + " (not b-bit)" * registry.quantizer_class(name).exceeds_bits for name in names}
    return {marked[name]: {"method": "replay", "quantizer": name, "bitW": int(table)} for name in names}


TABLES = {"methods": "4 bits, lsq", "4": "4 bits, replay", "2": "2 bits, replay"}


def main(argv: Sequence[str]) -> int:
    parser = Parser(description="Compare all methods, and all quantizers, under one protocol.")
    parser.add_argument("--data_dir", required=True, help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--out", required=True, help="folder of the runs and of table.md")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), help="which to make")
    parser.add_argument("--images_per_class", type=whole(1), default=150, help="training images")
    parser.add_argument("--num_tasks", type=whole(2), default=5, help="disjoint tasks")
    parser.add_argument("--num_epochs", type=whole(1), default=16, help="epochs a task")
    parser.add_argument("--image_size", type=whole(8), default=16, help="pixels a side; 32 costs four times as much")
    parser.add_argument("--train_batch_size", type=whole(2), default=16, help="images a step")
    parser.add_argument("--lr", type=real(above=0), default=0.0025, help="learning rate of all runs")
    parser.add_argument("--seeds", nargs="+", type=whole(0), default=[0], help="of classes, images and training")
    parser.add_argument("--jobs", type=whole(1), default=1, help="runs at a time")
    args = parser.parse_args(argv)
    out = Path(args.out)
    runs: dict[tuple[str, str, int], dict[str, Any]] = {}
    for seed in args.seeds:
        csv = out / f"seed{seed}" / "csv"
        split = ["--data_dir", args.data_dir, "--output_csv", "images.csv", "--output_dir", str(csv)]
        split += ["--num_tasks", str(args.num_tasks), "--diminish_rate", "100", "--seed", str(seed)]
        main_tasks([*split, "--source", "train", "--images_per_class", str(args.images_per_class)])
        main_tasks([*split, "--source", "test"])
        common = {
            name: getattr(args, name) for name in ("data_dir", "num_epochs", "train_batch_size", "lr", "image_size")
        }
        common |= {"csv_dir": csv, "seed": seed, "compile": "off"}
        for table in args.tables:
            for row, settings in rows(table).items():
                job = out / f"seed{seed}" / f"{table}_{row.replace(' ', '_').replace('_(not_b-bit)', '')}"
                runs[table, row, seed] = {**common, **settings, "job_dir": job}
    results = run_all(list(runs.values()), args.jobs)
    found: dict[str, dict[str, list]] = {table: {} for table in args.tables}
    for (table, row, _), settings in runs.items():
        if (result := results[str(settings["job_dir"])]) is not None:
            found[table].setdefault(row, []).append(result)
    text = "\n\n".join(f"{TABLES[table]}\n\n{markdown(table, found[table])}" for table in args.tables)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return 0


def masked(results: dict[str, Any]) -> float:
    return mean(results["top1_masked"][-1])


def spread(values: Sequence[float | None]) -> str:
    """Mean, with the standard deviation over seeds where there are several."""
    kept = [value for value in values if value is not None]
    if not kept:
        return "-"
    return number(mean(kept)) + (f" ± {number(stdev(kept))}" if len(kept) > 1 else "")


def markdown(table: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """A line a row, the best average first; bytes and speed are means over seeds."""
    lines = [HEAD.format("method" if table == "methods" else "quantizer")]
    order = sorted(found, key=lambda row: -mean(r["average_accuracy"] for r in found[row]))
    for row in order:
        runs = found[row]
        cells = [spread([r["average_accuracy"] for r in runs]), spread([masked(r) for r in runs])]
        cells.append(spread([r["forgetting"] for r in runs]))
        cells += [number(mean(r["memory_bytes"][kind] for r in runs) / 1000, 0) for kind in KINDS]
        cells.append(number(mean(r["images_per_second"] for r in runs), 0))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main))
