"""A run's folder: never overwritten unasked, gone on with, cleared, forked."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.equal import Killed, kill_at, read, same
from support.tiny import Tiny, arguments, settings, train

from lifequant import registry
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.data.task_csv import csv_text, read_rows
from lifequant.training import history
from lifequant.training.run import Run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    job = tmp_path_factory.mktemp("finished") / "run"
    train(tiny, job, method="replay")
    return job


def refused(argv: list[str], capsys: pytest.CaptureFixture, *words: str) -> None:
    capsys.readouterr()
    assert run_main(command, argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_another_run_is_refused(tiny, finished, tmp_path, capsys):
    """Three ways out are named. A folder with a model alone is as dear."""
    before = contents(finished)
    argv = arguments(settings(tiny, finished, method="replay"))
    refused(argv, capsys, str(finished), "--resume", "--reset", "another --job_dir")
    refused([*argv, "--reset", "--resume"], capsys, "contradict")
    assert contents(finished) == before
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "model_best.pt", tmp_path / "run")
    argv = arguments(settings(tiny, tmp_path / "run"))
    refused(argv, capsys, "holds another run")
    refused([*argv, "--resume"], capsys, "model_best.pt", "no checkpoint")
    assert [path.name for path in contents(tmp_path / "run")] == ["model_best.pt"]
    (tmp_path / "file").write_text("")
    refused(arguments(settings(tiny, tmp_path / "file")), capsys, "not a folder")


def test_reset(tiny, finished, tmp_path, capsys):
    """Clears what a run leaves, nothing else; never a source."""
    job = shutil.copytree(finished, tmp_path / "run")
    (job / "notes.txt").write_text("mine")
    (job / "run" / "task7").mkdir()
    (job / "checkpoint" / "task7.pt").write_text("old")
    found = train(tiny, job, method="original", num_tasks=1, reset=True)
    assert found["config"]["method"] == "original" and (job / "notes.txt").read_text() == "mine"
    assert not (job / "run" / "task7").exists() and not (job / "checkpoint" / "task7.pt").exists()
    before = contents(tmp_path)
    inside = settings(tiny, job, reset=True, source_dir=tmp_path, source_file="run/checkpoint/model_best.pt")
    refused(arguments(inside), capsys, "--reset would clear", "--source_file")
    refused(arguments(settings(tiny, job, reset=True, start_task=1, **{"from": job})), capsys, "would clear", "--from")
    assert contents(tmp_path) == before


def test_resume_of_a_finished_run(tiny, finished, capsys):
    """Prints its table, trains nothing."""
    before = contents(finished)
    assert command([*arguments(settings(tiny, finished, method="replay")), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and "average accuracy" in out and contents(finished) == before


def test_resume_without_a_checkpoint(tiny, tmp_path, capsys):
    """Starts anew and says so, also where a run died before its first checkpoint; what is free may change."""
    argv = arguments(settings(tiny, tmp_path / "run", method="original", num_tasks=1, print_freq=7))
    assert command([*argv, "--resume"]) == 0
    assert "starts anew" in capsys.readouterr().out
    for name in ("results.json", "model_best.pt"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    assert command([*argv, "--resume", "True"]) == 0
    assert "starts anew" in capsys.readouterr().out and (tmp_path / "run" / "results.json").exists()


def test_resume_elsewhere(tiny, finished, tmp_path, monkeypatch, capsys):
    """--resume PATH: a run's folder or a checkpoint in it, which goes on in an empty job_dir as in its own."""
    argv = arguments(settings(tiny, tmp_path / "run", method="replay", checkpoint_seconds=0))
    with monkeypatch.context() as patch:
        kill_at(patch, history, "step_sums", 7)
        with pytest.raises(Killed):
            command(argv)
    before = contents(tmp_path / "run")
    for path, job in (("run", "a"), ("run/checkpoint/last.pt", "b"), ("run/checkpoint/task0.pt", "c")):
        argv = arguments(settings(tiny, tmp_path / job, method="replay", resume=tmp_path / path))
        assert command(argv) == 0
        same(read(tmp_path / job), read(finished))
        assert (tmp_path / job / "config.json").exists()
    assert contents(tmp_path / "run") == before
    refused(argv, capsys, "holds another run than --resume")
    for path in ("nowhere", "run/checkpoint/lost.pt"):
        wrong = arguments(settings(tiny, tmp_path / "run", method="replay", resume=tmp_path / path))
        refused(wrong, capsys, "no checkpoint there")
    assert contents(tmp_path / "run") == before
    shutil.copy(tmp_path / "run" / "checkpoint" / "last.pt", tmp_path / "alone.pt")
    argv = arguments(settings(tiny, tmp_path / "d", method="replay", resume=tmp_path / "alone.pt"))
    refused(argv, capsys, "task0.pt is not beside it")


def forked(tiny: Tiny, job: Path, source: Path, **more: Any) -> dict[str, Any]:
    return train(tiny, job, **{"start_task": 1, "from": source, **more})


def same_but_for_the_fork(job: Path, straight: Path) -> None:
    """Every tensor and every number; the settings that say it is a fork apart."""
    mine, other = (checkpoint.read(folder / "checkpoint" / "last.pt", "run") for folder in (job, straight))
    for state in (mine, other):
        del state["config"]
    same(mine, other)
    mine, other = read(job), read(straight)
    for found in (mine, other):
        del found["config"]
    same(mine, other)


def test_fork(tiny, finished, tmp_path, capsys):
    """Ends as the straight run does: of the same method, of one without replay, of one without the penalty, of one with another loss."""
    forked(tiny, tmp_path / "again", finished, method="replay")
    same_but_for_the_fork(tmp_path / "again", finished)
    train(tiny, tmp_path / "original", method="original")
    forked(tiny, tmp_path / "other", tmp_path / "original", method="replay")
    assert "begun at task 1 with the state of" in capsys.readouterr().out
    same_but_for_the_fork(tmp_path / "other", finished)
    train(tiny, tmp_path / "ours", method="ours")
    train(tiny, tmp_path / "none", method="ours", penalty="none")
    before = contents(tmp_path / "none")
    forked(tiny, tmp_path / "proxq", tmp_path / "none", method="ours")
    same_but_for_the_fork(tmp_path / "proxq", tmp_path / "ours")
    assert contents(tmp_path / "none") == before
    train(tiny, tmp_path / "er_ace", method="er_ace")
    forked(tiny, tmp_path / "masked", tmp_path / "original", method="er_ace")
    same_but_for_the_fork(tmp_path / "masked", tmp_path / "er_ace")


def test_what_a_finished_run_keeps(tiny, finished, tmp_path, capsys):
    """The last state and each task's, without what the next task makes anew; or the last alone, and --from says so."""
    kept = [path for path in (finished / "checkpoint").iterdir() if path.name != "model_best.pt"]
    assert {path.name for path in kept} == {"last.pt", "task0.pt", "task1.pt"}
    assert all(path.stat().st_size < 1.05 * (finished / "model_best.pt").stat().st_size for path in kept)
    job = tmp_path / "run"
    found = train(tiny, job, method="replay", keep_checkpoints="last")
    assert {path.name for path in (job / "checkpoint").iterdir()} == {"last.pt", "model_best.pt"}
    found["config"]["keep_checkpoints"] = "tasks"
    same(found, read(finished))
    argv = arguments(settings(tiny, tmp_path / "fork", method="replay", start_task=1, **{"from": job}))
    refused(argv, capsys, "no checkpoint/task0.pt", "--keep_checkpoints last does not keep it")
    assert command([*arguments(settings(tiny, job, method="replay")), "--resume"]) == 0  # a free setting
    assert "is finished" in capsys.readouterr().out
    (job / "results.json").unlink()
    refused([*arguments(settings(tiny, job, method="replay")), "--resume"], capsys, "task0.pt is not beside it")


def test_checkpoints_of_former_versions_load(tiny, finished, tmp_path, monkeypatch):
    """They hold the optimizer's state between tasks too, and their settings lack a new one."""

    def former(run: Run) -> dict[str, Any]:
        state = original(run)
        del state["config"]["keep_checkpoints"]
        return {**state, "optimizer": run.optimizer.state_dict()}

    original, job = Run.state, tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "state", former)
        train(tiny, job, method="replay")
    assert checkpoint.read(job / "checkpoint" / "task0.pt", "run")["optimizer"]["state"]
    forked(tiny, tmp_path / "fork", job, method="replay")
    same_but_for_the_fork(tmp_path / "fork", finished)
    train(tiny, tmp_path / "on", method="replay", resume=job / "checkpoint" / "task0.pt")
    same(read(tmp_path / "on"), read(finished))


def test_fork_where_replay_csvs_lie(tiny, tmp_path):
    """They matter from task 1 on only."""
    folder = shutil.copytree(tiny.csvs, tmp_path / "csvs")
    for task in range(2):
        rows = read_rows(folder / f"tiny_train{task}.csv")
        (folder / f"tiny_replay{task}.csv").write_text(csv_text(rows[::5]))
    train(tiny, tmp_path / "original", method="original", csv_dir=folder)
    train(tiny, tmp_path / "replay", method="replay", csv_dir=folder)
    forked(tiny, tmp_path / "fork", tmp_path / "original", method="replay", csv_dir=folder)
    same_but_for_the_fork(tmp_path / "fork", tmp_path / "replay")


def test_fork_is_refused(tiny, finished, tmp_path, monkeypatch, capsys):
    """With the reason, where the two runs would have differed before."""
    base = {"method": "replay", "start_task": 1, "from": finished}
    for flags, word in (
        ({"quantizer": "proxq"}, "its quantizer is lsq, this run's proxq"),
        ({"loss": "ball"}, "its loss is ce"),
        ({"sampler": "ball"}, "its sampler is uniform"),
        ({"lr": 0.1}, "its lr is 0.04"),
        ({"seed": 1}, "its seed is 0"),
        ({"bitW": 2}, "its bitW is 4"),
        ({"method": "joint"}, "joint trains all tasks at once"),
        ({"start_task": 3}, "no checkpoint/task2.pt"),
        ({"csv_dir": tiny.csvs3}, "other images or tasks"),
    ):
        refused(arguments(settings(tiny, tmp_path / "run", **{**base, **flags})), capsys, word)
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr(registry.method("ours"), "per_step_state", True)
    ours = {**base, "method": "ours", "quantizer": "lsq", "loss": "ce", "sampler": "uniform"}
    refused(arguments(settings(tiny, tmp_path / "run", **ours)), capsys, "ours gathers state at every step")
    refused(arguments(settings(tiny, tmp_path / "run", **{**base, "start_task": 2, "replay_rate": 0.5})), capsys,
            "replay_rate", "before task 2")  # fmt: skip


def test_full_disk_later(tiny, tmp_path, monkeypatch, capsys):
    """The former checkpoint stays whole, and the run can go on once there is room."""
    argv = arguments(settings(tiny, tmp_path / "run", method="replay", checkpoint_seconds=0))
    calls = []

    def full(temporary: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) >= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(temporary, path)

    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert run_main(command, argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert checkpoint.read(tmp_path / "run" / "checkpoint" / "last.pt", "run")["step"] >= 1
    assert run_main(command, [*argv, "--resume"]) == 0


def test_unfit_checkpoint_to_resume(tiny, tmp_path, capsys):
    """Of another setting, class count or network: refused by name, and left as it is."""
    job, fewer = tmp_path / "run", shutil.copytree(tiny.csvs, tmp_path / "fewer")
    (fewer / "tiny_train0.csv").write_text((fewer / "tiny_train0.csv").read_text().rsplit("\n", 2)[0] + "\n")
    base = settings(tiny, job, method="replay", num_tasks=1)
    assert command(arguments(base)) == 0
    (job / "results.json").unlink()  # else the run is finished, and says so
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    for flags, word in (
        ({"bitW": 2}, "abitW was 4, now it is 2"),
        ({"target_model": "resnet56"}, "target_model was resnet20, now it is resnet56"),
        ({"lr": 0.5}, "lr was 0.04, now it is 0.5"),
        ({"num_classes": 8}, "num_classes was None, now it is 8"),
        ({"quantizer": "proxq"}, "proxq"),
        ({"csv_dir": fewer}, "other images or tasks"),
    ):
        assert run_main(command, [*arguments({**base, **flags}), "--resume"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and word in error, error
    last = before[job / "checkpoint" / "last.pt"]
    for content in (b"", b"broken", b"(lp0\n.", b"PK\x03\x04", last[: len(last) // 2], last[1:], bytes(100)):
        (job / "checkpoint" / "last.pt").write_bytes(content)
        assert run_main(command, [*arguments(base), "--resume"]) == 2
        assert "last.pt: not a " in capsys.readouterr().err
    (job / "checkpoint" / "last.pt").write_bytes(last)
    assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file()} == before
