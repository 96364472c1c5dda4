"""How long training waits for photographs, and how much memory they take: resnet18 at 224 pixels, for each place of --cache.

Makes JPEGs of 500x375 pixels, with some grain, from the small images in class folders (train/<class>/*.png, as ``lifequant
images`` writes them) in a temporary folder, and trains on them as ``lifequant train`` does, each case in a process of its own. Prints a table
in Markdown: the kinds of time from results.json (time_share), and the process's memory. "RSS then" and "RSS at the end" are
medians over the second and the last quarter of the samples, taken each second: where memory is flat they are the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

import numpy as np
from PIL import Image

from lifequant.common.arguments import Parser, int_at_least, run_main
from lifequant.common.errors import UserError
from lifequant.data.task_csv import csv_text

TOP = Path(__file__).resolve().parents[1]
SIZE, QUALITY = (500, 375), 90
GRAIN = 6  # standard deviation: else a file would be a third as large as a photograph's, and decoded sooner
FAST = {"amp": "bf16", "compile": "on"}  # the shortest step, which waits soonest
CASES = {
    "reference, encoded": {"augment": "reference", "cache": "encoded", **FAST},
    "reference, memory": {"augment": "reference", "cache": "memory", **FAST},
    "resized_crop, memory": {"augment": "resized_crop", "cache": "memory", **FAST},
    "resized_crop, encoded": {"augment": "resized_crop", "cache": "encoded", **FAST},
    "resized_crop, mmap": {"augment": "resized_crop", "cache": "mmap", **FAST},
    "reference, encoded, float32, not compiled": {"augment": "reference", "cache": "encoded", "compile": "off"},
}
KINDS = ("data", "step", "evaluation", "other")


def write_photographs(source: Path, root: Path, count: int) -> int:
    """``count`` JPEGs for training and a twentieth for the test, of all classes alike, and their task CSVs; returns the bytes."""
    names = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())
    wanted = {"train": count, "test": max(count // 20, 1)}
    for kind, most in wanted.items():
        each = -(-most // len(names))
        found = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((source / kind / name).glob("*.png"))[:each]
        ]
        if len(found) < most:
            raise UserError(f"--images {source}: {len(found)} images for {kind}, {most} are needed: lower --count")
        (root / "images" / kind).mkdir(parents=True)

        def write(index: int, kind: str = kind, found: list = found) -> str:
            name = f"{kind}/{index:06d}.jpg"
            picture = Image.open(found[index][0]).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
            grain = np.random.default_rng(index).normal(0, GRAIN, (SIZE[1], SIZE[0], 1))
            picture = Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))
            picture.save(root / "images" / name, quality=QUALITY)
            return name

        with ThreadPoolExecutor() as pool:
            rows = [(name, found[index][1]) for index, name in enumerate(pool.map(write, range(most)))]
        (root / "csv").mkdir(exist_ok=True)
        (root / "csv" / f"photographs_{kind}0.csv").write_text(csv_text(rows))
    return sum(path.stat().st_size for path in (root / "images" / "train").iterdir())


def measure(root: Path, case: str, batch: int, epochs: int) -> str:
    """A line of the table."""
    job = root / "run"
    flags = {"csv_dir": root / "csv", "data_dir": root / "images", "cache_dir": root / "cache", "job_dir": job,
             "target_model": "resnet18", "image_size": 224, "method": "original", "bitW": 32, "device": "cpu",
             "train_batch_size": batch, "eval_batch_size": batch, "num_epochs": epochs, "eval_every": epochs + 1, **CASES[case]}  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    log = root / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "lifequant", "train", "--reset", *words], env=environment, stdout=file, stderr=file
        )
    samples = []
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        with contextlib.suppress(OSError):
            samples.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        time.sleep(1)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{case}: the run failed: {log.read_text()[-500:]}")
    results = json.loads((job / "results.json").read_text())
    share = results["time_share"]
    share["other"] = 1 - sum(share[kind] for kind in ("data", "step", "evaluation"))
    quarter = len(samples) // 4
    then, end = (statistics.median(samples[q * quarter : (q + 1) * quarter]) / 1e6 for q in (1, 3))
    shares = " | ".join(f"{100 * share[kind]:.1f}" for kind in KINDS)
    return (
        f"| {case} | {shares} | {results['images_per_second']:.1f} | {share['startup_seconds']:.0f} | {then:.0f} | {end:.0f} "
        f"| {usage.ru_maxrss * 1024 / 1e6:.0f} |"
    )


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="measure_photographs.py", description=__doc__.split("\n")[0])
    parser.add_argument("--images", required=True, help="folder with train/ and test/, and class folders in each")
    parser.add_argument("--count", type=int_at_least(20), default=5000, help="photographs for training")
    parser.add_argument("--batch", type=int_at_least(2), default=32, help="images a step")
    parser.add_argument("--epochs", type=int_at_least(1), default=1)
    parser.add_argument("--cases", default=";".join(CASES), help="which cases, with ; between them")
    parser.add_argument("--folder", help="where the temporary folder is made")
    args = parser.parse_args(argv)
    cases = [case.strip() for case in args.cases.split(";")]
    if unknown := [case for case in cases if case not in CASES]:
        raise UserError(f"--cases {unknown[0]!r}: known are {'; '.join(CASES)}")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="lifequant-photographs-") as folder:
        size = write_photographs(Path(args.images), Path(folder), args.count)
        print(f"{args.count} photographs of {SIZE[0]}x{SIZE[1]}, {size / 1e6:.0f} MB of JPEG; batches of {args.batch}, {args.epochs} epochs, {os.cpu_count()} cores\n")  # fmt: skip
        print("| case | waits for data (%) | step (%) | evaluation (%) | other (%) | images/s | start (s) | RSS then (MB) | RSS at the end (MB) | highest RSS (MB) |")  # fmt: skip
        print("|---" * 10 + "|", flush=True)
        for case in cases:
            print(measure(Path(folder), case, args.batch, args.epochs), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
