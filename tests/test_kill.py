"""A run that is killed, preempted or started twice: what is on disk is whole, and it ends as if nothing had been."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.equal import read, same
from support.tiny import arguments, settings, train

from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint, run_folder
from lifequant.common import fault_injection
from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.runtime import preemption
from lifequant.training import history

FREE = {"checkpoint_seconds": 0}


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(tiny, folder, method="derpp", **FREE)
    return folder


def start(argv: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lifequant", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def ends_the_same(argv: list[str], folder: Path, straight: Path) -> None:
    assert command([*argv, "--resume", "True"]) == 0
    same(read(folder), read(straight))
    for name, kind in (("last.pt", "run"), ("task0.pt", "run"), ("task1.pt", "run"), ("model_best.pt", "model")):
        same(*(checkpoint.read(place / "checkpoint" / name, kind) for place in (folder, straight)), name)


@pytest.mark.parametrize("point", ["rename:3", "change:2"])
def test_killed_at_a_point(tiny, straight, tmp_path, point):
    """By SIGKILL, between a checkpoint's two renames and at the end of the last task."""
    argv = arguments(settings(tiny, tmp_path / "run", method="derpp", **FREE))
    process = start(argv, LIFEQUANT_FAULT=point)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    if point.startswith("rename"):
        assert {p.name for p in (tmp_path / "run/checkpoint").glob("*.pt")} == {"last.pt", "previous.pt"}
    ends_the_same(argv, tmp_path / "run", straight)


def test_points_are_all_passed(tiny, tmp_path, monkeypatch):
    """A point that no run passes would test nothing."""
    passed = set()
    monkeypatch.setattr(fault_injection, "point", passed.add)
    train(tiny, tmp_path / "run", method="original", num_tasks=1, cache_dir=tmp_path / "cache")
    assert passed == set(fault_injection.POINTS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_with_a_checkpoint(tiny, straight, tmp_path, capsys, monkeypatch, number):
    """The step is finished, its state written, the way to go on said."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    argv = arguments(settings(tiny, tmp_path / "run", method="derpp", **FREE | {"checkpoint_seconds": 1000}))
    code, error = stopped_at_step(argv, 7, number, monkeypatch, capsys)
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}[number]
    begin, line = error.split("; go on with: lifequant ")
    assert begin == f"lifequant: stopped by {number.name}; the state is written"
    assert shlex.split(line) == [*argv, "--resume"]
    state = checkpoint.read(tmp_path / "run/checkpoint/last.pt", "run")
    assert 6 * state["task_index"] + state["step"] > 0 and state["step"] > 0
    ends_the_same(argv, tmp_path / "run", straight)


def stopped_at_step(argv, call, number, monkeypatch, capsys) -> tuple[int, str]:
    """(exit code, stderr) where the signal comes in the ``call``-th training step."""

    original, calls = history.step_sums, []

    def with_signal(*given):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*given)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(history, "step_sums", with_signal)
        code = run_main(command, argv)
    return code, capsys.readouterr().err


def test_a_slurm_job_is_requeued(tiny, tmp_path, monkeypatch, capsys):
    """By scontrol, where its command line would go on; else it says why not."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    argv = arguments(settings(tiny, tmp_path / "run", method="original"))
    code, error = stopped_at_step(argv, 2, signal.SIGUSR1, monkeypatch, capsys)
    assert code == 138 and "not requeued" in error and not (tmp_path / "asked").exists()
    code, error = stopped_at_step([*argv, "--resume", "True"], 2, signal.SIGUSR1, monkeypatch, capsys)
    assert code == 0 and "job 17 was requeued" in error and (tmp_path / "asked").read_text() == "requeue 17\n"


def test_a_second_signal_ends_at_once(tiny, tmp_path):
    """Even one that comes while the state of the first is written; the last checkpoint is whole."""
    argv = arguments(settings(tiny, tmp_path / "run", method="original", num_epochs=500, **FREE))
    process = start(argv)
    wait_for(tmp_path / "run/checkpoint/previous.pt", process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert f"; go on with: {sys.executable} -m lifequant --csv_dir " in error and error.endswith(" --resume\n")
    assert process.returncode == 130 and time.monotonic() - began < 10 and "Traceback" not in error
    found, _ = checkpoint.read_last(tmp_path / "run/checkpoint/last.pt", print)
    assert found["step"] > 0


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_a_signal_outside_the_loop_stops_at_once(monkeypatch):
    with pytest.raises(preemption.Stopped) as caught, preemption.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert not caught.value.saved and caught.value.number == signal.SIGTERM


def test_a_step_that_takes_too_long_is_left(monkeypatch):
    """Such as one in which the step is compiled."""
    monkeypatch.setattr(preemption, "PATIENCE", 0.2)
    began = time.monotonic()
    with pytest.raises(preemption.Stopped) as caught, preemption.handled(), preemption.polled(True):
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested()
        time.sleep(5)
    assert not caught.value.saved and time.monotonic() - began < 2


def test_two_runs_in_one_folder(tiny, tmp_path, capsys):
    """The second is refused, and names the first; a lock whose owner has died is taken over."""
    argv = arguments(settings(tiny, tmp_path / "run", method="original", num_epochs=500, **FREE))
    process = start(argv)
    try:
        wait_for(tmp_path / "run/checkpoint/last.pt", process)
        for flags in (["--resume", "True"], ["--reset"]):
            assert run_main(command, [*argv, *flags]) == 2
            assert f"is in use by process {process.pid} on " in capsys.readouterr().err
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "run" / run_folder.LOCK).exists()
    argv = arguments(settings(tiny, tmp_path / "run", method="original", reset=True, num_tasks=1))
    assert command(argv) == 0
    assert f"process {process.pid} on " in (out := capsys.readouterr().out) and "has died; taken over" in out
    assert not (tmp_path / "run" / run_folder.LOCK).exists()


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(UserError), run_folder.locked(tmp_path / "a" / "b", print):
        assert (tmp_path / "a" / "b" / run_folder.LOCK).exists()
        raise UserError("refused")
    assert not list(tmp_path.iterdir())


def test_damage_is_found(tmp_path):
    """A changed bit among the values, and a file that is cut off; torch reads an undamaged file as any other."""
    path = tmp_path / "a.pt"
    checkpoint.write(path, {"kind": "run", "w": torch.arange(1000.0)})
    data = path.read_bytes()
    assert torch.load(path, weights_only=True)["schema"] == checkpoint.SCHEMA
    position = data.index(torch.arange(1000.0).numpy().tobytes()) + 5
    flipped = data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
    for changed in (flipped, b"x" + data, data[:-1], data[: len(data) // 2], b""):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"a\.pt: not a checkpoint that can be read"):
            checkpoint.read(path, "run")


def test_a_broken_last_checkpoint(tiny, straight, tmp_path, capsys):
    """The one before it is taken, with a warning; where both are broken it is an error."""
    folder = shutil.copytree(straight, tmp_path / "run")
    (folder / "results.json").unlink()
    shutil.copy(folder / "checkpoint" / "task0.pt", folder / "checkpoint" / "previous.pt")  # as before the run's end
    last = folder / "checkpoint" / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    argv = arguments(settings(tiny, folder, method="derpp", **FREE))
    ends_the_same(argv, folder, straight)
    out = " ".join(capsys.readouterr().out.split())
    assert "last.pt: not a checkpoint that can be read" in out
    assert "the checkpoint before it is taken instead" in out
    for name in ("last.pt", "previous.pt"):
        (folder / "checkpoint" / name).write_bytes(data)
    assert run_main(command, [*argv, "--resume", "True"]) == 2
    assert "previous.pt: not a checkpoint" in capsys.readouterr().err


def test_a_broken_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    whole = [checkpoint.content({"kind": "run", "step": step}) for step in range(3)]
    for content, kept in ((whole[0], None), (whole[1], 0), (whole[2], 0)):
        checkpoint.write_bytes(last, content, previous)
        assert not previous.exists() if kept is None else previous.read_bytes() == whole[kept]
        if kept == 0:
            last.write_bytes(b"broken")
