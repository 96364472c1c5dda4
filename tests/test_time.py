"""What a run does beside its steps: the account of its time, checkpoints in the background, whether it compiles."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import threading
import time

import pytest
import torch
from support.equal import Killed, kill_at, read, same
from support.tiny import arguments, settings, train

from lifequant import options
from lifequant import train as loop
from lifequant.__main__ import train as command
from lifequant.checkpointing import async_writer, checkpoint
from lifequant.checkpointing.async_writer import Writer
from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.data.task import Task
from lifequant.results import results
from lifequant.runtime.device import COMPILE_FROM_STEPS, wants_compile
from lifequant.training import history, timer

CPU = torch.device("cpu")


class Hours:
    """A clock that goes on only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def slow(self, monkeypatch: pytest.MonkeyPatch, module: object, name: str, seconds: float) -> list[int]:
        """Each call of the function takes so many seconds; the list grows by each."""
        original, calls = getattr(module, name), []

        def slower(*args, **kwargs):
            calls.append(1)
            self.now += seconds
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, slower)
        return calls


def test_each_second_has_one_kind(monkeypatch):
    hours = Hours(monkeypatch)
    graphs = [0]
    monkeypatch.setattr(timer, "_graphs", lambda: graphs[0])
    rows = history.new_history()
    times = timer.Timer(rows, begin=990.0)
    assert times.time_share() is None  # nothing but start-up yet
    hours.now += 5  # 15 s in all
    times.switch("other")
    for seconds, made in ((50.0, 1), (4.0, 0), (4.0, 0), (30.0, 1)):  # two compilations, one of them late
        times.switch("data")
        hours.now += 1
        times.switch("step")
        hours.now += seconds
        graphs[0] += made
        times.step(8)
        times.switch("logging")
        hours.now += 0.5
        with times.within("step"):
            hours.now += 0.5
    with times.part("method", "method"):
        hours.now += 3
        with times.part("evaluation", "evaluation"):
            hours.now += 7
        hours.now += 2
    assert rows["seconds_by_part"] == {"method": 12, "evaluation": 7}
    times.stop()
    times = timer.Timer(dict(rows))  # as after a resumption
    hours.now += 1
    times.switch("checkpoint")
    hours.now += 6
    share = times.time_share()
    seconds = {"step": 10, "evaluation": 7, "method": 5, "data": 4, "logging": 2, "checkpoint": 6, "other": 0}
    assert share.pop("startup_seconds") == 16 and share.pop("compile_seconds") == 80
    assert share.pop("overhead") == pytest.approx(17 / 34)
    assert share == pytest.approx({kind: value / 34 for kind, value in seconds.items()})
    assert sum(share.values()) == pytest.approx(1)


def test_time_share_of_a_run(tiny, tmp_path, monkeypatch):
    """Where the clock goes on in certain calls alone, every share is known."""
    hours = Hours(monkeypatch)
    load = hours.slow(monkeypatch, loop, "load_dataset", 100)
    batches = hours.slow(monkeypatch, Task, "training_batch", 1)
    steps = hours.slow(monkeypatch, history, "step_sums", 10)
    tests = hours.slow(monkeypatch, results, "evaluate", 4)
    windows = hours.slow(monkeypatch, results, "refuse_nonfinite", 2)
    saved = hours.slow(monkeypatch, checkpoint, "model_state", 3)  # at the end, when results are written
    copies = hours.slow(monkeypatch, async_writer, "snapshot", 5)
    found = train(tiny, tmp_path / "run", method="replay", checkpoint_seconds=0)
    seconds = {
        "step": 10 * len(steps), "evaluation": 4 * len(tests), "method": 0, "data": len(batches),
        "logging": 2 * len(windows) + 3 * len(saved), "checkpoint": 5 * len(copies), "other": 0,
    }  # fmt: skip
    total = sum(seconds.values())
    overhead = total - seconds["step"] - seconds["evaluation"]
    assert len(load) == 1 and len(copies) == len(steps) > 2
    expected = {kind: value / total for kind, value in seconds.items()} | {"overhead": overhead / total}
    assert found["time_share"] == pytest.approx(expected | {"startup_seconds": 100, "compile_seconds": 0})


def test_time_goes_on_after_a_resumption(tiny, tmp_path, monkeypatch):
    """Both processes count, each with its start-up; what a checkpoint had not seen is lost, as the steps are."""
    argv = arguments(settings(tiny, tmp_path / "run", method="replay", checkpoint_seconds=0))
    hours = Hours(monkeypatch)
    hours.slow(monkeypatch, loop, "load_dataset", 100)
    steps = hours.slow(monkeypatch, history, "step_sums", 10)
    with monkeypatch.context() as patch:
        kill_at(patch, history, "step_sums", 4)
        with pytest.raises(Killed):
            command(argv)
    assert command([*argv, "--resume"]) == 0
    found = read(tmp_path / "run")
    assert found["time_share"]["startup_seconds"] == 200 and found["time_share"]["step"] == 1
    assert found["seconds_by_part"]["training"] == 10 * (len(steps) - 3)  # a part that a kill ends is not counted
    state = checkpoint.read(tmp_path / "run" / "checkpoint" / "last.pt", "run")
    assert state["history"]["seconds_by_kind"]["step"] == 10 * len(steps)


def test_the_clock_is_cheap():
    """Two switches, a step and a window a step: far below 0.5 % of the shortest step, some 10 ms."""
    times = timer.Timer(history.new_history())
    fastest = 1.0
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(1000):
            times.switch("data"), times.switch("step"), times.step(8), times.switch("logging")
        fastest = min(fastest, (time.perf_counter() - begin) / 1000)
    assert fastest < 50e-6


def state_of(value: float) -> dict:
    weight = torch.full((4, 3, 2, 2), value).to(memory_format=torch.channels_last)
    return {"kind": "run", "model": {"w": weight, "same": weight.view(4, 3, 2, 2)}, "history": {"rows": [value]}}


def test_a_slow_disk_does_not_hold_up_steps(tmp_path, monkeypatch):
    """write returns while the disk is at work; what is written is the state as it was then, byte for byte."""
    go, original, written = threading.Event(), checkpoint.write_bytes, []

    def slow(path, content, *previous):
        assert go.wait(30)
        written.append(path.name)
        original(path, content, *previous)

    monkeypatch.setattr(checkpoint, "write_bytes", slow)
    state = state_of(1.0)
    with Writer() as writer:
        writer.write(state, tmp_path / "task0.pt", tmp_path / "last.pt")
        state["model"]["w"].add_(1)  # training goes on
        state["history"]["rows"].append(2)
        assert not list(tmp_path.iterdir())
        go.set()
        writer.write(state, tmp_path / "task1.pt")
    assert written == ["task0.pt", "last.pt", "task1.pt"]
    monkeypatch.setattr(checkpoint, "write_bytes", original)
    (tmp_path / "direct").mkdir()
    checkpoint.write(tmp_path / "direct" / "last.pt", state_of(1.0))
    direct = (tmp_path / "direct" / "last.pt").read_bytes()
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "task0.pt").read_bytes() == direct
    assert torch.load(tmp_path / "task1.pt", weights_only=True)["history"] == {"rows": [1.0, 2]}


def test_an_error_of_the_disk_is_raised_once(tmp_path, monkeypatch):
    def full(path, content, *previous):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_bytes", full)
    writer = Writer()
    writer.write(state_of(1.0), tmp_path / "a.pt")
    with pytest.raises(OSError, match="No space left"):
        writer.write(state_of(1.0), tmp_path / "b.pt")
    writer.wait()
    with pytest.raises(OSError, match="No space left"), Writer() as writer:
        writer.write(state_of(1.0), tmp_path / "a.pt")
    with pytest.raises(Killed), Writer() as writer:  # the first error is the one to tell
        writer.write(state_of(1.0), tmp_path / "a.pt")
        raise Killed


def test_a_run_whose_last_checkpoint_fails(tiny, tmp_path, monkeypatch, capsys):
    """Its error is not lost with the thread: one line, exit code 2, no results."""
    original = checkpoint.write_bytes

    def full(path, content, *previous):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, content, *previous)

    monkeypatch.setattr(checkpoint, "write_bytes", full)
    argv = arguments(settings(tiny, tmp_path / "run", method="original", num_tasks=1))
    assert run_main(command, argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error
    assert not (tmp_path / "run" / "results.json").exists()


def test_compile_auto_is_a_rule(monkeypatch):
    """Of device and steps; it says what it chose and why; a resumed run does as it did before."""
    said: list[str] = []
    monkeypatch.setattr(shutil, "which", lambda name: name)
    auto, least = options.make(method="replay"), COMPILE_FROM_STEPS["cpu"]
    assert wants_compile(auto, CPU, least, said.append) and not wants_compile(auto, CPU, least - 1, said.append)
    assert "auto: on" in said[0] and "auto: off" in said[1] and all(str(least) in line for line in said)
    assert wants_compile(options.make(method="replay", compile="on"), CPU, 1, said.append)
    assert not wants_compile(options.make(method="replay", compile="off"), CPU, 10**6, said.append)
    assert len(said) == 2  # who asked for it knows
    assert wants_compile(auto, CPU, 1, said.append, kept=True)
    assert not wants_compile(auto, CPU, 10**6, said.append, kept=False)
    assert "on" in said[2] and "off" in said[3] and all("checkpoint" in line for line in said[2:])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not wants_compile(auto, CPU, 10**6, said.append)
    assert "off" in said[4] and "C++ compiler" in said[4]
    for config, kept in ((auto, True), (options.make(method="replay", compile="on"), None)):
        with pytest.raises(UserError, match=r"C\+\+ compiler"):
            wants_compile(config, CPU, 10**6, said.append, kept)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # triton is there, which needs a C compiler
    assert not wants_compile(auto, torch.device("cuda"), 10**6, said.append) and "a C compiler is not there" in said[5]


def test_a_resumed_run_compiles_as_before(tiny, tmp_path, monkeypatch, capsys):
    """By what its checkpoint says, though the rule would have it otherwise now; and it ends the same."""
    base = {"method": "replay", "compile": "auto", "checkpoint_seconds": 0}
    train(tiny, tmp_path / "straight", **base)
    argv = arguments(settings(tiny, tmp_path / "run", **base))
    with monkeypatch.context() as patch:
        kill_at(patch, history, "step_sums", 4)
        with pytest.raises(Killed):
            command(argv)
    assert checkpoint.read(tmp_path / "run" / "checkpoint" / "last.pt", "run")["compiled"] is False
    monkeypatch.setitem(COMPILE_FROM_STEPS, "cpu", 1)
    capsys.readouterr()
    assert command([*argv, "--resume"]) == 0
    assert "--compile auto: off (as the run began, by its checkpoint)" in capsys.readouterr().out
    same(read(tmp_path / "run"), read(tmp_path / "straight"))


@pytest.mark.parametrize(("more", "graphs"), [({"method": "ours"}, 1), ({"method": "replay", "distill": 1}, 2)])
def test_a_new_task_compiles_nothing_anew(more, graphs, tiny, tmp_path, monkeypatch):
    """One graph for all tasks, and one of the former task's model where something distils from it."""
    made, compiler = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph

    monkeypatch.setattr(shutil, "which", lambda name: name)  # this backend needs no C++ compiler
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compiler(model, backend=backend, dynamic=False))
    found = train(tiny, tmp_path / "run", compile="on", csv_dir=tiny.csvs3, **more)
    torch.compiler.reset()
    assert len(found["tasks"]) == 3 and len(made) == graphs
    assert found["time_share"]["compile_seconds"] > 0
