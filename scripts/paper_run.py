"""The time of a run of the paper's size: CIFAR-100, 50,000 training images, 3 tasks, 50 epochs a task, ours at 4 bits.

python scripts/paper_run.py --images data_dir/cifar100 --job_dir experiment/paper_size

``--images`` has train/<class>/*.png and test/<class>/*.png. Where a class has fewer than 500 training or 100 test images
they are repeated until it has (as links): the time is that of the whole, the accuracies are not, and the last line says so.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

import torch

from lifequant import options, train
from lifequant.common.arguments import Parser, int_at_least, run_main
from lifequant.common.errors import UserError
from lifequant.data.create import tasks
from lifequant.results.versions import commit

SIZE = {"train": 500, "test": 100}  # images a class of CIFAR-100


def repeat(source: Path, target: Path) -> bool:
    """Fill ``target`` with SIZE images a class, linked from ``source``; whether any had to be repeated."""
    repeated = False
    for side, count in SIZE.items():
        folders = sorted(path for path in (source / side).glob("*") if path.is_dir())
        if not folders:
            raise UserError(f"--images {source}: it has no {side}/<class>/ (prepare_images.py makes such folders)")
        for folder in folders:
            files = sorted(path for path in folder.iterdir() if path.is_file())
            repeated |= len(files) < count
            (target / side / folder.name).mkdir(parents=True, exist_ok=True)
            for number, file in enumerate(itertools.islice(itertools.cycle(files), count), start=1):
                link = target / side / folder.name / f"{number:04d}{file.suffix}"
                link.unlink(missing_ok=True)
                try:
                    link.hardlink_to(file)
                except OSError:  # another disk
                    shutil.copyfile(file, link)
    return repeated


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="paper_run.py", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument(
        "--job_dir", type=Path, required=True, help="folder of the run; images and task CSVs go below it"
    )
    parser.add_argument("--num_epochs", type=int_at_least(1), default=50, help="epochs a task")
    parser.add_argument("--flags", default="", help='more flags of the run: --flags="--amp bf16"')
    args = parser.parse_args(argv)
    images, csv = args.job_dir / "images", args.job_dir / "csv"
    repeated = repeat(args.images, images)
    for source in SIZE:
        tasks.main_tasks(["--data_dir", str(images), "--output_csv", "cifar100.csv", "--num_tasks", "3",
                             "--diminish_rate", "25", "--source", source, "--output_dir", str(csv)])  # fmt: skip
    argv = ["--csv_dir", str(csv), "--job_dir", str(args.job_dir / "run"), "--num_epochs", str(args.num_epochs)]
    config, _ = options.parse([*argv, *args.flags.split()])
    found = train.run(config)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() and config.device != "cpu" else "CPU"
    trained = sum(task["train_images"] + task["replay_images"] for task in found["tasks"]) * args.num_epochs
    print(
        f"{where}, torch {torch.__version__}, lifequant {commit()}, batch {config.train_batch_size}, amp {config.amp}"
    )
    print(
        f"{trained} images trained on in {found['seconds']:.1f} s, {found['images_per_second']:.0f} images/s of training"
    )
    if repeated:
        print("images were repeated to that size: times are the whole data set's, accuracies are not")


if __name__ == "__main__":
    sys.exit(run_main(main))
