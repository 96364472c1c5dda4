"""A data set of tiny pictures with its task CSVs, and runs that take a second or two."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lifequant.__main__ import train as command
from lifequant.common.arguments import run_main
from lifequant.data.create.tasks import main_tasks

CLASSES = ["ant", "bee", "cow", "dog", "eel", "fox"]
SIDE = 16
TRAIN, TEST = 8, 4  # images a class


def write_images(root: Path, classes: list[str] = CLASSES, train: int = TRAIN, test: int = TEST) -> Path:
    """train/<class>/0001.png, ... and test/<class>/...: noise around a color of the class."""
    noise = np.random.default_rng(0)
    colors = noise.integers(60, 196, (len(classes), 3))
    for side, count in (("train", train), ("test", test)):
        for color, name in zip(colors, classes, strict=True):
            (root / side / name).mkdir(parents=True)
            for number in range(1, count + 1):
                pixels = color + noise.integers(-60, 60, (SIDE, SIDE, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / side / name / f"{number:04d}.png")
    return root


def write_csvs(images: Path, folder: Path, name: str = "tiny", num_tasks: int = 2, rate: float = 50) -> Path:
    """The task CSVs of both sources. Two tasks at 50 %: 4 of 6 classes each, 2 of them shared."""
    flags = {"data_dir": images, "output_csv": f"{name}.csv", "num_tasks": num_tasks, "diminish_rate": rate}
    for source in ("train", "test"):
        argv = [f"--{flag}={value}" for flag, value in {**flags, "source": source, "output_dir": folder}.items()]
        with contextlib.redirect_stdout(io.StringIO()):
            assert run_main(main_tasks, argv) == 0
    return folder


@dataclass(frozen=True)
class Tiny:
    """The shared folders. Tests read them only; one that changes a CSV copies ``csvs`` first."""

    images: Path
    csvs: Path  # two tasks
    csvs3: Path  # three tasks, 25 %


def settings(tiny: Tiny, job: Path, **more: Any) -> dict[str, Any]:
    """Of a run as small as they come."""
    least = {"csv_dir": tiny.csvs, "data_dir": tiny.images, "job_dir": job, "image_size": SIDE, "num_epochs": 1}
    return {**least, "train_batch_size": 8, "eval_batch_size": 24, "compile": "off", "device": "cpu", **more}


def arguments(flags: dict[str, Any]) -> list[str]:
    """A command line; None leaves a flag out, True stands for the bare flag."""
    argv: list[str] = []
    for name, value in flags.items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


def train(tiny: Tiny, job: Path, **more: Any) -> dict[str, Any]:
    """Run in process through the command line's own parser; results.json as read back."""
    assert command(arguments(settings(tiny, job, **more))) == 0
    return json.loads((job / "results.json").read_text(), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
