"""Memory of a run's data: images held decoded (--cache memory) or encoded, and read from their file (mmap), over two epochs.

Makes a data set of JPEGs in a temporary folder: few distinct pictures, each copied to many names. It is loaded as a run
loads it (the first time decoded into the cache), then every training image goes through a batch twice: drawn, augmented,
normalized, the network left out. Each case is a process of its own, so that none sees another's memory.

RSS is what counts against a process, and of it RssAnon what can't be given back; VmHWM is the highest RSS until then,
RssFile the pages of files, libraries among them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

import numpy as np
import torch
from PIL import Image

from lifequant import options, registry
from lifequant.common.arguments import Parser, int_at_least, run_main
from lifequant.common.errors import UserError
from lifequant.common.seeding import generator
from lifequant.data import dataset
from lifequant.data.replay import epoch_order
from lifequant.data.task_csv import csv_text

DISTINCT = 20  # pictures
FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
CASES = {
    "build mmap": {"cache": "mmap"},
    "mmap": {"cache": "mmap"},
    "memory": {"cache": "memory"},
    "encoded": {"cache": "encoded"},
    "reference": {"cache": "encoded", "augment": "reference"},
}


def write_data(root: Path, count: int, side: int) -> None:
    """images/*.jpg, pictures of about ``side`` pixels, copied to ``count`` names, and their task CSVs in csv/."""
    noise = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "csv").mkdir()
    for number in range(DISTINCT):
        coarse = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side + 8 * number, side + 60), Image.Resampling.BICUBIC)
        picture.save(root / "images" / f"{number}.jpg")
    names = [f"{number % DISTINCT}.jpg" for number in range(count)]
    for number in range(DISTINCT, count):
        names[number] = f"{number}.jpg"
        shutil.copyfile(root / "images" / f"{number % DISTINCT}.jpg", root / "images" / names[number])
    tests = [f"test{number}.jpg" for number in range(DISTINCT)]
    for number, name in enumerate(tests):
        shutil.copyfile(root / "images" / f"{number}.jpg", root / "images" / name)
    for kind, images in (("train", names), ("test", tests)):
        rows = [(image, number % DISTINCT) for number, image in enumerate(images)]
        (root / "csv" / f"large_{kind}0.csv").write_text(csv_text(rows))


def memory() -> dict[str, int]:
    """kB by name, of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return {name: int(values[name]) for name in FIELDS}


def one_case(root: Path, case: str, batch: int, side: int) -> None:
    """Load, then an epoch of batches; prints lines of a table."""
    config = options.make(
        csv_dir=root / "csv", data_dir=root / "images", cache_dir=root / "cache", image_size=side,
        train_batch_size=batch, method="original", device="cpu", **CASES[case],
    )  # fmt: skip

    def line(where: str, seconds: float) -> None:
        row = "".join(f"{value / 1000:10.0f}" for value in memory().values())
        print(f"{case:<12}{where:<14}{row}{seconds:10.1f}", flush=True)

    line("start", 0)
    begin = time.perf_counter()
    found = dataset.load_dataset(config, torch.device("cpu"), lambda text: None)
    line("loaded", time.perf_counter() - begin)
    if case.startswith("build"):
        return
    task = found.task(0, config, registry.method("original").joint)
    order = epoch_order(task.labels[task.pool], task.counts, "uniform", generator(0, "order"))
    epoch, steps = task.epoch(order, batch), len(order) // batch
    begin = time.perf_counter()
    draws = ((epoch, step % steps, generator(0, "augment", step)) for step in range(2 * steps))
    for step, _ in enumerate(task.training_batches(draws)):
        if step == 0 or (step + 1) % -(-steps // 2) == 0 or step == 2 * steps - 1:
            line(f"batch {step + 1}", time.perf_counter() - begin)


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="measure_memory.py", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int_at_least(DISTINCT), default=13_500, help="training images")
    parser.add_argument("--side", type=int_at_least(8), default=224, help="pixels a side after decoding")
    parser.add_argument("--batch", type=int_at_least(2), default=64, help="images a batch")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--case", choices=CASES, help="measure one case in the data that --folder has (used by itself)")
    args = parser.parse_args(argv)
    if not Path("/proc/self/status").is_file():
        raise UserError("this reads /proc/self/status, which only Linux has")
    if args.case:
        return one_case(Path(args.folder), args.case, args.batch, args.side)
    nbytes = (args.images + DISTINCT) * 3 * args.side**2
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="lifequant-memory-") as folder:
        print(
            f"{args.images} images of {args.side}x{args.side}: {nbytes / 1e9:.2f} GB on disk in {folder}, removed at the end"
        )
        write_data(Path(folder), args.images, args.side)
        print(f"{'MB (1e6)':<26}" + "".join(f"{name:>10}" for name in FIELDS) + f"{'seconds':>10}", flush=True)
        for case in CASES:
            again = ["--case", case, "--folder", folder, "--batch", str(args.batch), "--side", str(args.side)]
            subprocess.run([sys.executable, __file__, *again], check=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
