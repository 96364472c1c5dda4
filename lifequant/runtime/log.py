"""What a run says: TensorBoard, the text log, the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tensorboardX.summary import hparams
from tqdm import tqdm

from lifequant.common.arguments import one_line
from lifequant.runtime.tensorboard import Curves

COMPARED = [
    "method",
    "quantizer",
    "act_quantizer",
    "bitW",
    "abitW",
    "loss",
    "sampler",
    "penalty",
    "ll_lambda",
    "replay_rate",
    "buffer_size",
    "lr",
    "num_epochs",
    "seed",
]


class Log:
    """Curves under ``job_dir/run`` (one TensorBoard run a task, so that a chart has one curve a task), ``logger.log``."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.file: TextIO | None = None
        self.early: list[str] = []  # said before the run had a folder
        self.warnings: list[str] = []
        self.writers: dict[str, Curves] = {}

    def open(self, job_dir: Path) -> None:
        """From here on, lines and curves go to the run's folder."""
        self.folder = job_dir / "run"
        self.file = (job_dir / "logger.log").open("a", encoding="utf-8", buffering=1)
        self.file.writelines(self.early)

    def say(self, text: str) -> None:
        """A line on the terminal and in the log."""
        text = "\n".join(one_line(line) for line in text.split("\n"))
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        self.note(text)

    def note(self, text: str) -> None:
        """A line in the log alone."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        self.file.write(line) if self.file else self.early.append(line)

    def warn(self, text: str) -> None:
        """A line that is also kept for results.json, once."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.say(f"warning: {text}")

    def writer(self, run: str, purge_step: int | None = None) -> Curves:
        """The writer of a run below ``run/``. ``purge_step``: TensorBoard forgets what was written from this step on."""
        if run not in self.writers:
            self.writers[run] = Curves(self.folder / run, purge_step)
        return self.writers[run]

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()

    def close(self) -> None:
        for file in (*self.writers.values(), self.file):
            with contextlib.suppress(
                OSError
            ):  # what must be on disk was flushed; the disk's error has been raised then
                file and file.close()

    def summary(self, results: dict[str, Any]) -> None:
        """The accuracy matrix as a picture, and the settings with the final metrics for the hparams tab."""
        root = self.writer(".", purge_step=0)
        root.add_image("accuracy/matrix", matrix_picture(results["top1"]), len(results["top1"]))
        settings = {name: value for name in COMPARED if (value := results["config"][name]) is not None}
        names = ("average_accuracy", "average_incremental_accuracy", "forgetting", "bwt", "fwt")
        metrics = {f"final/{name}": results[name] for name in names if results[name] is not None}
        for part in hparams(settings, metrics):
            root.add(part)
        for name, value in metrics.items():
            root.add_scalar(name, value, 0)
        self.flush()


def matrix_picture(matrix: list[list[float]], cell: int = 72) -> np.ndarray:
    """uint8 [H, W, 3]: accuracies in percent, a row a trained task, a column a test set; darker is better."""
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    image = Image.new("RGB", ((len(matrix[0]) + 1) * cell, (len(matrix) + 1) * cell), "white")
    draw = ImageDraw.Draw(image)
    for column in range(len(matrix[0])):
        draw.text(((column + 1.5) * cell, cell / 2), f"test {column}", "black", small, anchor="mm")
    for row, values in enumerate(matrix):
        draw.text((cell / 2, (row + 1.5) * cell), f"after {row}", "black", small, anchor="mm")
        for column, value in enumerate(values):
            shade = round(255 - 2 * value)
            left, top = (column + 1) * cell, (row + 1) * cell
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), (shade, shade, 255))
            draw.text(
                (left + cell / 2, top + cell / 2),
                f"{value:.1f}",
                "black" if shade > 120 else "white",
                font,
                anchor="mm",
            )
    return np.asarray(image)


def not_b_bit(results: dict[str, Any]) -> str:
    """The quantizer and its most codes where a tensor has more than 2^bits of them; else an empty string."""
    over = [c["codes"] for c in results["max_codes_per_tensor"].values() if c["codes"] > 2 ** c["bits"]]
    return f"{results['config']['quantizer']} gives up to {max(over)} codes a tensor" if over else ""


def table(results: dict[str, Any]) -> str:
    """The accuracy matrix with its averages, readable at 80 columns: at most the first 7 and the last task's columns."""
    matrix, tasks = results["top1"], results["tasks"]
    shown = list(range(len(tasks))) if len(tasks) <= 8 else [*range(7), len(tasks) - 1]
    lines = ["top-1 (%)     " + "".join(f"{'test ' + str(tasks[i]['id']):>8}" for i in shown)]
    for row, values in enumerate(matrix):
        name = f"after task {tasks[row]['id']}" if len(matrix) == len(tasks) else "after all tasks"
        lines.append(f"{name:<15.15}"[:14] + "".join(f"{values[i]:8.2f}" for i in shown))
    masked = results["top1_masked"][-1]
    lines.append(f"{'task-masked':<14}" + "".join(f"{masked[i]:8.2f}" for i in shown))
    if len(shown) < len(tasks):
        lines.append(f"({len(tasks) - len(shown)} columns are not shown; results.json has all)")

    def line(*names: str) -> str:
        values = ((name, results[name.replace(" ", "_")]) for name in names)
        return "   ".join(f"{name} {'-' if v is None else format(v, '.2f')}" for name, v in values)

    memory = "  ".join(f"{name} {size / 1000:.0f}" for name, size in results["memory_bytes"].items() if size)
    if results["average_accuracy_nme"] is not None:
        lines.append(f"{'by exemplars':<14}" + "".join(f"{results['top1_nme'][-1][i]:8.2f}" for i in shown))
    return "\n".join(
        [
            *lines,
            line("average accuracy", "average accuracy weighted"),
            line("forgetting", "forgetting rate", "bwt", "fwt"),
            f"memory (kB): {memory}",
            *([f"not {results['config']['bitW']}-bit: {exceeding}"] if (exceeding := not_b_bit(results)) else []),
        ]
    )
