"""What starts the runs of a sweep, and the one that starts them on this machine; slurm.py has another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from lifequant.experiments.slurm import TRAIN, python_path


class Executor(Protocol):
    """Starts runs, at most ``slots`` at a time."""

    slots: int
    queues: bool  # whether a run may wait before it begins

    def start(self, arguments: list[str], log: Path) -> Any: ...

    def code(self, handle: Any) -> int | None:
        """The exit code of a run; None while it runs."""

    def stop(self, handles: list[Any]) -> None:
        """Called when the sweep is stopped, with the runs that are still running."""


class Local:
    """Runs processes on this machine, which share its cores."""

    queues = False

    def __init__(self, jobs: int) -> None:
        self.slots = jobs
        threads = str(max(1, (os.cpu_count() or 1) // jobs))  # unless the user says how many
        self.environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            **os.environ,
            "PYTHONPATH": python_path(),
        }

    def start(self, arguments: list[str], log: Path) -> subprocess.Popen:
        with log.open("w", encoding="utf-8") as out:
            words = [sys.executable, *TRAIN, *arguments]
            return subprocess.Popen(
                words, stdout=out, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def code(self, handle: subprocess.Popen) -> int | None:
        return handle.poll()

    def stop(self, handles: list[subprocess.Popen]) -> None:
        for handle in handles:
            handle.terminate()  # they write a checkpoint
        for handle in handles:
            handle.wait()
