"""Numbers that go wrong: what is not finite changes nothing, is named, and is left out where the user says so; warnings."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.equal import Killed, read, same
from support.tiny import arguments, settings, train

from lifequant import train as training
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.results import run_warnings
from lifequant.training import nonfinite

STEP = training.training_step
MORE = {"num_epochs": 2, "print_freq": 3, "track_oscillations": True, "ema": 0.9}  # 8 steps in task 0, 10 in task 1
Deed = Callable[[Any, Any], Any]  # (run, batch) -> what to do at a step instead, or None


def at(monkeypatch: pytest.MonkeyPatch, place: int, steps: set[int], deed: Deed) -> list[int]:
    """At these steps of a task, whenever they are done, training_step has the batch that ``deed(run, batch)`` gives; its
    sums where it gives a tensor. Returns the steps at which it was done."""
    done: list[int] = []

    def training_step(run: Any, batch: Any, factor: float) -> Any:
        if run.task_index == place and run.step in steps:
            done.append(run.step)
            batch = deed(run, batch)
        return batch if torch.is_tensor(batch) else STEP(run, batch, factor)

    monkeypatch.setattr(training, "training_step", training_step)
    return done


def spoil(run: Any, batch: Any) -> Any:
    """An image of NaN: of no part of the state, so that all is as before once the step is undone."""
    return batch._replace(x=torch.full_like(batch.x, math.nan))


def defer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check numbers as on a GPU, when the loss is read."""
    make = nonfinite.FiniteCheck.__init__

    def init(self: Any, config: Any, *rest: Any) -> None:
        make(self, config, *rest)
        self.deferred = config.on_nan == "stop"

    monkeypatch.setattr(nonfinite.FiniteCheck, "__init__", init)


def fails(tiny: Any, job: Path, capsys: Any, **more: Any) -> str:
    """The one line of a run that ends with exit code 2."""
    assert run_main(command, arguments(settings(tiny, job, **more))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def state(job: Path) -> dict[str, Any]:
    """checkpoint/last.pt, times and what says how steps are watched apart."""
    found = checkpoint.read(job / "checkpoint" / "last.pt", "run")
    found["config"].pop("on_nan")
    found["history"].pop("skipped", None)
    found.pop("warnings")
    return found


@pytest.mark.parametrize("method", ["ours", "si"])
def test_the_state_of_before_is_kept(method, tiny, tmp_path, monkeypatch, capsys):
    """Bit for bit that of a run which was killed there; a resumption that leaves the step out goes on without it."""

    def die(run: Any, batch: Any) -> Any:
        raise Killed

    more = {**MORE, "method": method, "checkpoint_seconds": 0}
    with monkeypatch.context() as patch:
        at(patch, 1, {4}, die)
        with pytest.raises(Killed):
            command(arguments(settings(tiny, tmp_path / "killed", **more)))
    with monkeypatch.context() as patch:
        at(patch, 1, {4}, lambda run, batch: torch.zeros_like(run.sums))
        train(tiny, tmp_path / "without", **more)
    done = at(monkeypatch, 1, {4}, spoil)
    error = fails(tiny, tmp_path / "run", capsys, **more)
    assert "diverged in task 1, step 4: the task loss is nan" in error and "first layer with an output" in error
    assert "is conv1" in error and "--resume --on_nan skip" in error and "smaller --lr" in error
    assert len(done) == 1
    assert state(tmp_path / "run")["step"] == 4
    same(state(tmp_path / "run"), state(tmp_path / "killed"))
    assert "diverged in task 1, step 4" in fails(tiny, tmp_path / "run", capsys, resume=True, **more)
    found = train(tiny, tmp_path / "run", resume=True, on_nan="skip", **more)
    same(state(tmp_path / "run"), state(tmp_path / "without"))
    assert found["skipped_steps"] == 1
    assert sum("is skipped" in warning and "task 1, step 4" in warning for warning in found["warnings"]) == 1


def test_a_deferred_check_stops_at_the_last_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    """Where reading each step's numbers would wait for the device: no spoiled state is written, and the run goes on from
    the one before."""
    more = {**MORE, "method": "ours", "checkpoint_seconds": 0}
    with monkeypatch.context() as patch:
        at(patch, 1, {4}, lambda run, batch: torch.zeros_like(run.sums))
        train(tiny, tmp_path / "without", **more)
    defer(monkeypatch)
    at(monkeypatch, 1, {4}, spoil)
    error = fails(tiny, tmp_path / "run", capsys, **more)
    assert "diverged in task 1, at most 3 steps before step 5" in error and "last checkpoint is kept" in error
    assert state(tmp_path / "run")["step"] == 4
    train(tiny, tmp_path / "run", resume=True, on_nan="skip", **more)
    same(state(tmp_path / "run"), state(tmp_path / "without"))


def test_skipped_steps_are_counted(tiny, tmp_path, monkeypatch):
    """Said once; a whole run without any is the same with both flags, and counts none."""
    whole = train(tiny, tmp_path / "whole", method="ours", **MORE)
    same(state(tmp_path / "whole"), _skipping(tiny, tmp_path))
    at(monkeypatch, 0, {0, 3, 4}, spoil)
    found = train(tiny, tmp_path / "run", method="ours", on_nan="skip", **MORE)
    assert (whole["skipped_steps"], found["skipped_steps"]) == (0, 3)
    assert [warning.count("task 0, step 0 ") for warning in found["warnings"] if "is skipped" in warning] == [1]


def _skipping(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    train(tiny, tmp_path / "skipping", method="ours", on_nan="skip", **MORE)
    return state(tmp_path / "skipping")


def test_too_many_in_a_row(tiny, tmp_path, monkeypatch, capsys):
    """Three may be left out; the fourth ends the run, and its resumption, at once."""
    monkeypatch.setattr(nonfinite, "MOST_IN_A_ROW", 3)
    at(monkeypatch, 0, {1, 2, 4, 5, 6, 7}, spoil)
    for more in ({}, {"resume": True}):
        error = fails(tiny, tmp_path / "run", capsys, method="ours", on_nan="skip", **more, **MORE)
        assert "diverged in task 0, step 7" in error and "3 steps in a row were skipped" in error


def test_the_first_step(tiny, tmp_path, monkeypatch, capsys):
    """Nothing is written before anything was trained; a resumption begins anew, or where the task before ended."""
    with monkeypatch.context() as patch:
        at(patch, 0, {0}, spoil)
        assert "Nothing was trained before" in fails(tiny, tmp_path / "run", capsys, method="si")
        assert not (tmp_path / "run" / "checkpoint" / "last.pt").exists()
        train(tiny, tmp_path / "run", method="si", resume=True, on_nan="skip")
    at(monkeypatch, 1, {0}, spoil)
    assert "The task before is kept" in fails(tiny, tmp_path / "next", capsys, method="si")
    assert train(tiny, tmp_path / "next", method="si", resume=True, on_nan="skip")["skipped_steps"] == 1


def test_the_layer_is_named(tiny, tmp_path, monkeypatch, capsys):
    """A weight, an output, a gradient."""

    def plant(run: Any, batch: Any) -> Any:
        with torch.no_grad():
            run.model.layer2[1].conv2.weight[0, 0, 0, 0] = math.inf
        return batch

    def poison(run: Any, batch: Any) -> Any:
        run.model.layer3[0].conv1.weight.register_hook(lambda gradient: gradient * math.nan)
        return batch

    def overflow(run: Any, batch: Any) -> Any:
        run.model.layer1[2].bn1.register_forward_hook(lambda module, args, output: output * math.inf)
        return batch

    for deed, words in (
        (plant, "layer2.1.conv2.weight itself is not finite"),
        (poison, "the first gradient that is not finite is that of layer3.0.conv1.weight"),
        (overflow, "the first layer with an output that is not finite is layer1.2.bn1"),
    ):
        with monkeypatch.context() as patch:
            at(patch, 0, {2}, deed)
            error = fails(tiny, tmp_path / deed.__name__, capsys, method="original")
            assert "task 0, step 2" in error and words in error


@pytest.mark.parametrize(
    ("flags", "term"),
    [
        ({"method": "ours", "ll_lambda": 1e30}, "the penalty"),
        ({"method": "replay", "distill": 1e38}, "the distillation"),
        ({"method": "derpp", "derpp_alpha": 1e38}, "the task loss"),
    ],
)
def test_the_loss_term_is_named(flags, term, tiny, tmp_path, capsys):
    """One that is not finite, or the largest where its gradient is what overflows."""
    error = fails(tiny, tmp_path / "run", capsys, num_epochs=2, **flags)
    assert "diverged in task 1, step " in error and term in error
    assert state(tmp_path / "run")["task_index"] == 1


@pytest.mark.parametrize("lr", [1000, 1e8])
def test_a_learning_rate_that_is_too_high(lr, tiny, tmp_path, capsys):
    """One line, whether a step shows it or the tests do, also where steps are left out."""
    more = {"method": "ours", "num_tasks": 1, "num_epochs": 4, "lr": lr}
    assert "smaller --lr" in fails(tiny, tmp_path / "stop", capsys, **more)
    assert "No step can be skipped for it" in fails(tiny, tmp_path / "skip", capsys, on_nan="skip", **more)
    if (last := tmp_path / "stop" / "checkpoint" / "last.pt").exists():
        kept = checkpoint.read(last, "run")
        assert all(torch.isfinite(value).all() for value in kept["model"].values())
        assert all(torch.isfinite(s["momentum_buffer"]).all() for s in kept["optimizer"]["state"].values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -7.0])
def test_largest(value):
    """Of all layouts, against a plain loop; NaN and infinity are never lost."""
    tensors = [torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last), torch.tensor(-2.5), torch.rand(3)]
    assert nonfinite.largest(tensors) == 2.5
    tensors[0][2, 1, 4, 3] = value
    assert torch.equal(nonfinite.largest(tensors).isnan(), torch.tensor(math.isnan(value)))
    if not math.isnan(value):
        assert nonfinite.largest(tensors) == abs(value)


def test_chance_of():
    """Against the sum in fractions."""
    for images, rate, hits in ((16, Fraction(1, 4), 9), (100, Fraction(1, 10), 0), (100, Fraction(1, 10), 100), (37, Fraction(2, 5), 15)):  # fmt: skip
        exact = sum(math.comb(images, k) * rate**k * (1 - rate) ** (images - k) for k in range(hits, images + 1))
        assert run_warnings.chance_of(hits, images, float(rate)) == pytest.approx(float(exact), rel=1e-9)


def warned(labels: list[int], accuracy: float) -> list[str]:
    """What is warned of a task with these test labels, learned so well."""
    said: list[str] = []
    test = SimpleNamespace(labels=torch.tensor(labels))
    run = SimpleNamespace(
        data=SimpleNamespace(test=test, test_rows=[list(range(len(labels)))], ids=[5]),
        history={"top1_masked": [[accuracy]]},
        log=SimpleNamespace(warnings=said, warn=said.append),
    )
    run_warnings._warn_of_chance(run, 0)
    run_warnings._warn_of_chance(run, 0)
    return said


def test_at_chance():
    """Ten classes of 100 images: 12 % may be chance, 13 % is not. Nine of ten images of one class: 90 % is chance."""
    balanced = [place % 10 for place in range(1000)]
    assert [bool(warned(balanced, accuracy)) for accuracy in (0, 10, 12, 13, 50)] == [True, True, True, False, False]
    assert "task 5: its accuracy is at chance: 10.0 %" in warned(balanced, 10)[0] and len(warned(balanced, 10)) == 1
    uneven = [0] * 900 + [1] * 100
    assert warned(uneven, 90) and warned(uneven, 91) and not warned(uneven, 93)
    assert not warned([3] * 50, 100)  # of one class nothing can be said


def test_warned_once(tiny, tmp_path, monkeypatch):
    """Three tasks that learn nothing, with a layer of one code and a penalty that dwarfs the loss: a line of each."""

    def flatten(run: Any, batch: Any) -> Any:
        sums = STEP(run, batch, 1.0)
        with torch.no_grad():
            run.model.layer1[0].conv1.weight.zero_()
        return sums

    with monkeypatch.context() as patch:
        for name in ("penalty",):
            patch.setattr(training.registry.method("original"), name, lambda self, model: torch.tensor(1e3))
        patch.setattr(training, "training_step", lambda run, batch, factor: flatten(run, batch))
        found = train(tiny, tmp_path / "run", method="original", csv_dir=tiny.csvs3, lr=1e-9, ll_lambda=1)
    words = ("is at chance", "all weights of layer1.0.conv1 have one code", "larger than the task loss")
    for word in words:
        assert sum(word in warning for warning in found["warnings"]) == 1, word
    log = (tmp_path / "run" / "logger.log").read_text()
    assert all(log.count(word) == 1 for word in words)
    good = train(tiny, tmp_path / "good", method="replay", num_epochs=30, lr=0.05)
    assert good["warnings"] == [] or not any(word in warning for warning in good["warnings"] for word in words)
    assert read(tmp_path / "good")["top1_masked"][1][1] > 60


def test_held_down_once(tiny, tmp_path):
    """A strong penalty in two later tasks: one line, of the first of them."""
    more = {"csv_dir": tiny.csvs3, "num_epochs": 6}
    found = train(tiny, tmp_path / "run", method="ours", ll_lambda=1e5, **more)["warnings"]
    about = [w for w in found if "larger than the task loss" in w or "holds it down" in w]
    assert 1 <= len(about) <= 2 and "task 1" in about[0] and len({w.split("(")[0][8:] for w in about}) == len(about)
    free = train(tiny, tmp_path / "free", method="ours", ll_lambda=0, **more)["warnings"]
    assert not any("larger than the task loss" in w for w in free)
