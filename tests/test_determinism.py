"""The same bytes whatever only watches a run: the progress bar, curves, how often losses are read, evaluation, checkpoints."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equal import read, same
from support.tiny import arguments, settings, train

from lifequant.checkpointing import checkpoint
from lifequant.runtime import log

MORE = {"method": "ours", "num_epochs": 2, "print_freq": 3}


class NoCurves:
    """Stands in for curves that write nothing."""

    def __init__(self, *given: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(tiny, folder, **MORE)
    return folder


def same_bytes(job: Path, straight: Path, *apart: str) -> None:
    """Model, last.pt's tensors and numbers, results.json; ``apart`` are settings that were changed."""
    for name, kind in (("model_best.pt", "model"), ("last.pt", "run"), ("task0.pt", "run")):
        states = [checkpoint.read(folder / "checkpoint" / name, kind) for folder in (job, straight)]
        for state in states:
            for setting in apart:
                state["config"].pop(setting, None)
        same(*states, name)
    found = [read(folder) for folder in (job, straight)]
    for results in found:
        for setting in apart:
            results["config"].pop(setting, None)
    same(*found)


@pytest.mark.parametrize(
    "changed",
    [{"print_freq": 1}, {"print_freq": 1000}, {"checkpoint_seconds": 0}, {"eval_batch_size": 5}, {"eval_every": 1000}],
    ids=lambda changed: "".join(f"{name}={value}" for name, value in changed.items()),
)
def test_how_often_it_is_looked_at(tiny, straight, tmp_path, changed):
    train(tiny, tmp_path / "run", **{**MORE, **changed})
    if "eval_batch_size" in changed:  # sums of errors are rounded by batches: the model is the same, bit for bit
        weights = [checkpoint.read(f / "checkpoint/last.pt", "run")["model"] for f in (tmp_path / "run", straight)]
        same(*weights)
        return
    same_bytes(tmp_path / "run", straight, *changed)


def test_without_curves(tiny, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "Curves", NoCurves)
    train(tiny, tmp_path / "run", **MORE)
    assert not list((tmp_path / "run").rglob("events.*"))
    same_bytes(tmp_path / "run", straight)


def test_without_evaluation_in_between(tiny, straight, tmp_path, monkeypatch):
    """The model alone: what is not evaluated is not in results.json."""
    from lifequant.results import results

    monkeypatch.setattr(results, "end_task", lambda run, task: None)
    monkeypatch.setattr(results, "finish", lambda run: {})
    from lifequant.__main__ import train as command

    assert command(arguments(settings(tiny, tmp_path / "run", **MORE))) == 0
    weights = [checkpoint.read(f / "checkpoint/last.pt", "run")["model"] for f in (tmp_path / "run", straight)]
    same(*weights)


@pytest.mark.parametrize("bar", ["without", "with"])
def test_another_process_and_the_progress_bar(tiny, straight, tmp_path, bar):
    """The bar is there on a terminal only; a pseudo-terminal is one."""
    words = [sys.executable, "-m", "lifequant", *arguments(settings(tiny, tmp_path / "run", **MORE))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment.pop("TQDM_DISABLE", None)
    if bar == "without":
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0 and done.stderr == ""
    else:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # Linux says so when the other end is closed
            pass
        assert process.wait(60) == 0 and b"task 1 |" in shown
    same_bytes(tmp_path / "run", straight)
