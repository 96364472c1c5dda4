"""Preemption: what SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (Slurm, some time before its limit) do to a run.

In the loop over steps the step is finished and a checkpoint written; elsewhere (compilation, evaluation, importances) the
run stops at once, and the last checkpoint stands. A run that has not ended after PATIENCE seconds is ended; a second
signal ends it immediately. A checkpoint is replaced in one go, so that the last one is whole in every case.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 4.0  # seconds for the step, then as many for the way out
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGUSR1"):  # not on Windows
    CODES[signal.SIGUSR1] = 138


class Stopped(BaseException):
    """The run was asked to stop. It is no Exception, so that no handler of errors catches it."""

    def __init__(self, number: int, saved: bool) -> None:
        self.number, self.saved = signal.Signals(number), saved


_number = 0  # of the first signal
_polled = False  # whether the loop over steps is running, which asks for it
_raised = False
_command = ""  # that goes on with the run


@contextmanager
def handled(command: str = "") -> Iterator[None]:
    """Inside, the signals are handled; ``command`` goes on with the run. Only the main thread can do that."""
    global _number, _raised, _command
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _number, _raised, _command = 0, False, command
    former = {number: signal.signal(number, _arrived) for number in CODES}
    if hasattr(signal, "SIGALRM"):
        former[signal.SIGALRM] = signal.signal(signal.SIGALRM, _too_long)
    try:
        yield
    finally:
        _alarm(0)
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def polled(alone: bool) -> Iterator[None]:
    """Put this around a loop that asks ``requested`` after each step.

    Several processes (not ``alone``) can't agree on a step without a message at each, so there a signal stops at once.
    """
    global _polled
    _polled = alone
    try:
        yield
    finally:
        _polled = False


def requested() -> bool:
    """Whether a signal asks the loop over steps to stop."""
    return _number != 0


def stop() -> None:
    """Stop the run, after its state has been written."""
    _raise(saved=True)


def _arrived(number: int, frame: FrameType | None) -> None:
    global _number
    if _number:
        _leave("again")
    _number = number
    _alarm(PATIENCE)
    if not _polled:
        _raise(saved=False)


def _too_long(number: int, frame: FrameType | None) -> None:
    if _raised:
        _leave(f"and not done after {2 * PATIENCE:g} s")
    _alarm(PATIENCE)
    _raise(saved=False)


def _raise(saved: bool) -> None:
    global _raised
    _raised = True
    raise Stopped(_number, saved)


def _leave(why: str) -> None:
    """End the process at once, with one line."""
    text = f"\nlifequant: {signal.Signals(_number).name} {why}: ended at once; the last checkpoint stands{_then()}\n"
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
    os._exit(CODES[_number])


def _alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _then() -> str:
    return f"; go on with: {_command}" if _command else ""


def ending(stopped: Stopped, resumes: bool) -> tuple[int, str]:
    """(exit code, message). After SIGUSR1 a Slurm job is queued again if its command line ``resumes``."""
    name, code = stopped.number.name, CODES[stopped.number]
    done = "the state is written" if stopped.saved else "the last checkpoint stands"
    text = f"stopped by {name}; {done}"
    job = os.environ.get("SLURM_JOB_ID")
    if name != "SIGUSR1" or not job:
        return code, text + _then()
    if not resumes:
        why = f"job {job} was not requeued: its command line has no --resume, so it would be refused"
        return code, f"{text} ({why}){_then()}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError) as error:
        return code, f"{text} (job {job} could not be requeued: {error}){_then()}"
    return 0, f"{text}, and job {job} was requeued"
