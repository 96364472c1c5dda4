"""Where a run writes its messages and curves: the terminal, the text log, TensorBoard."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from lifequant.common.errors import one_line
from lifequant.common.text import wrapped
from lifequant.runtime.tensorboard import Curves


class Log:
    """Writes lines to the terminal and to ``logger.log``, and curves to ``job_dir/run``."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.file: TextIO | None = None
        self.early: list[str] = []  # said before the run had a folder
        self.warnings: list[str] = []
        self.curves: Curves | None = None

    def open(self, job_dir: Path) -> None:
        """Write lines and curves to the run's folder from here on."""
        self.folder = job_dir / "run"
        self.file = (job_dir / "logger.log").open("a", encoding="utf-8", buffering=1)
        self.file.writelines(self.early)

    def say(self, text: str) -> None:
        """Write lines to the terminal, none wider than 80 columns, and to the log, as they are."""
        lines = [one_line(line) for line in text.split("\n")]
        tqdm.write("\n".join(wrapped(line, break_words=False) for line in lines), file=sys.stdout)
        sys.stdout.flush()
        self.note("\n".join(lines))

    def epoch(self, text: str) -> None:
        """Write an epoch's line to the log, and to the terminal where no progress bar shows the same."""
        if sys.stdout.isatty() and sys.stderr.isatty():
            self.note(text)
        else:
            self.say(text)

    def note(self, text: str) -> None:
        """Write a line to the log alone."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        self.file.write(line) if self.file else self.early.append(line)

    def warn(self, text: str) -> None:
        """Write a warning once, and keep it for results.json."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.say(f"warning: {text}")

    def open_curves(self, purge_step: int) -> Curves:
        """Begin a file of curves. TensorBoard forgets what former files have from ``purge_step`` on."""
        self.curves = Curves(self.folder, purge_step)
        return self.curves

    def flush(self) -> None:
        if self.curves:
            self.curves.flush()

    def close(self) -> None:
        for file in (self.curves, self.file):
            with contextlib.suppress(
                OSError
            ):  # what must be on disk was flushed; the disk's error has been raised then
                file and file.close()
