"""Where the checks of scripts/gpu_check.py work: commands in processes of their own, the time that is left, small runs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import Any

from gpu_checking.report import Call
from lifequant.common.errors import one_line
from lifequant.common.safe_files import short

TOP = Path(__file__).resolve().parents[2]
MAIN = "resnet-20-cifar-10/main.py"  # from the clone's top, where commands are run
MAKE = "lifelong_data_generation"
LIMIT = 240  # seconds for one command; more is a hang
LEAST = 5  # seconds that must be left to start one
SMALL = {"train_batch_size": 64, "num_epochs": 1}
SIZE = {"cuda": 32, "cpu": 8}  # pixels a side


class Failed(Exception):
    """A command did not do what it should; the message is the row's text. ``call`` is the command, where there is one."""

    def __init__(self, text: str, call: Call | None = None) -> None:
        super().__init__(text)
        self.call = call


class TimeUp(Exception):
    """The time of all checks is over; the message is the row's text."""


class Site:
    """``folder`` is for all files, ``device`` is "cuda" or "cpu", ``deadline`` a time.monotonic()."""

    def __init__(self, folder: Path, device: str, deadline: float) -> None:
        self.folder, self.device, self.deadline = folder, device, deadline
        self.calls: list[Call] = []  # of the check at work
        self.machine: dict[str, Any] = {}  # what the first check has found
        self._made: dict[str, Call | Failed] = {}
        self._running: set[subprocess.Popen] = set()
        self._one = RLock()

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def call(self, *words: object, codes: Sequence[int] = (0,), limit: float = LIMIT, **variables: str) -> Call:
        """Run a command at the clone's top. Raises Failed for another exit code and for a hang, TimeUp."""
        if self.left() < LEAST:
            raise TimeUp("no time left (--minutes gives more)")
        call = Call([str(word) for word in words], variables)
        self.calls.append(call)
        patience, began = min(limit, self.left()), time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", **variables}
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                call.words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=TOP, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            try:
                call.code = process.wait(patience)
            except subprocess.TimeoutExpired:
                pass
            finally:
                kill(process)
                self._running.discard(process)
                call.bad = call.code not in codes
                call.seconds = time.monotonic() - began
                for name, file in (("out", out), ("err", err)):
                    file.seek(0)
                    setattr(call, name, file.read().decode(errors="replace"))
        if call.code is None:
            if patience < limit:
                raise TimeUp(f"the time was up {call.seconds:.0f} s after its start (--minutes gives more)")
            raise Failed(f"no end after {limit:.0f} s: {last_line(call)}", call)
        if call.code not in codes:
            raise Failed(f"{call.ending()}: {last_line(call)}", call)
        return call

    def stop(self) -> None:
        """Kill what is running, and start nothing more."""
        self.deadline = -math.inf
        for process in list(self._running):
            kill(process)

    def worker(self, *words: object) -> Any:
        """What a command of workers.py answers."""
        call = self.call(sys.executable, "-W", "ignore", "scripts/gpu_checking/workers.py", *words)
        return json.loads(call.out.splitlines()[-1])

    def digits(self) -> Path:
        """Folder of images: scikit-learn's digits; the CSVs of two tasks are in ``folder``/csv."""
        images = self.folder / "digits"
        with self._one:
            if not (self.folder / "csv" / "digits_test1.csv").exists():
                self.call(sys.executable, f"{MAKE}/prepare_images.py", "--dataset", "digits", "--out", images)
                for source in ("train", "test"):
                    self.call(
                        sys.executable, f"{MAKE}/lifeLongDataGeneator.py", "--data_dir", images, "--output_csv",
                        "digits.csv", "--num_tasks", 2, "--diminish_rate", 100, "--source", source, "--output_dir",
                        self.folder / "csv",
                    )  # fmt: skip
        return images

    def train(
        self, name: str, codes: Sequence[int] = (0,), variables: dict[str, str] | None = None, **flags: Any
    ) -> Call:
        """A run of two small tasks by main.py in ``folder``/``name``. Raises Failed, also where it leaves no results."""
        images = self.digits()
        paths = {"csv_dir": self.folder / "csv", "data_dir": images, "cache_dir": self.folder / "cache"}
        given = {**paths, "job_dir": self.folder / name, "device": self.device, "image_size": SIZE[self.device]}
        given |= {**SMALL, "compile": "off", **flags}
        words = [word for flag, value in given.items() for word in (f"--{flag}", value)]
        call = self.call(sys.executable, MAIN, *words, codes=codes, **(variables or {}))
        if call.code == 0:
            self.results(name)
        return call

    def train_once(self, name: str, **how: Any) -> Call:
        """The same; a run that two checks want is made by the first one only, and fails for both."""
        if name not in self._made:
            try:
                self._made[name] = self.train(name, **how)
            except Failed as failed:
                self._made[name] = failed
        found = self._made[name]
        call = found.call if isinstance(found, Failed) else found
        if call and all(call is not one for one in self.calls):
            self.calls.append(call)
        if isinstance(found, Failed):
            raise found
        return found

    def results(self, name: str) -> dict[str, Any]:
        """results.json of a run of ``train``. Raises Failed."""
        path = self.folder / name / "results.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Failed(f"{name}: results.json can't be read: {error}") from None


def kill(process: subprocess.Popen) -> None:
    """A command with all that it has started, such as torch's compile workers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(call: Call) -> str:
    lines = call.last_lines()
    return short(one_line(lines[-1].strip())) if lines else "it said nothing"
