"""Runs of a sweep as Slurm jobs, through submitit.

A job is one run with --resume True. Before its time is over, or when it is preempted, Slurm signals submitit, and submitit asks
the job for its checkpoint. The run gets SIGTERM, writes its own checkpoint and ends; then the job is queued again. Jobs go on
when the sweep is stopped. The same sweep, started again, finds them finished, or waits for them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lifequant
from lifequant.common.errors import UserError

try:
    import submitit
except ImportError:  # an extra: Slurm's constructor says so
    submitit = None

TRAIN = ("-m", "lifequant", "train")


def _ignore_signal() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def python_path() -> str:
    """PYTHONPATH for processes that must find this package, also where it is a clone that nobody installed."""
    folders = [str(Path(lifequant.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, folders))


class Job:
    """What a node runs; submitit pickles it."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.arguments, self.log = arguments, log
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        with self.log.open("w", encoding="utf-8") as out:
            # Slurm may send its signal to all processes of a job; it is this one's to answer.
            self.process = subprocess.Popen(
                [sys.executable, *TRAIN, *self.arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_ignore_signal,
            )
            return self.process.wait()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit when the job must stop."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        return submitit.helpers.DelayedSubmission(Job(self.arguments, self.log))


class Slurm:
    """An executor of sweep; ``args`` are its flags."""

    queues = True

    def __init__(self, args: Any, folder: Path) -> None:
        if submitit is None:
            raise UserError("--slurm needs submitit: pip install 'lifequant[slurm]'")
        self.slots = args.jobs
        os.environ["PYTHONPATH"] = python_path()  # which a node inherits
        self.executor = submitit.AutoExecutor(folder=folder, cluster=args.cluster)
        self.executor.update_parameters(
            name="lifequant", timeout_min=args.minutes, cpus_per_task=args.cpus, gpus_per_node=args.gpus,
            **({"slurm_partition": args.partition} if args.partition else {}),
        )  # fmt: skip

    def start(self, arguments: list[str], log: Path) -> submitit.Job:
        return self.executor.submit(Job(arguments, log))

    def code(self, handle: submitit.Job) -> int | None:
        if not handle.done():
            return None
        try:
            return handle.result()
        except Exception:  # the job was canceled, or submitit's own part failed: its log tells
            return 1

    def stop(self, handles: list[submitit.Job]) -> None:
        """Leave the jobs to Slurm, and say how to cancel them."""
        for handle in handles:
            print(f"job {handle.job_id} goes on; scancel {handle.job_id} stops it", file=sys.stderr)
