"""--bit_schedule: each rung a run of its own, from the model of the rung before."""

from __future__ import annotations

import pytest
import torch
from support.equal import Killed, kill_at, read, same
from support.tiny import arguments, settings

from lifequant import options
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.progressive_bits import rungs
from lifequant.training import history

SCHEDULE = {"bit_schedule": "32,4,2", "method": "ours"}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    job = tmp_path_factory.mktemp("ladder") / "run"
    assert command(arguments(settings(tiny, job, **SCHEDULE))) == 0
    return job


def test_rungs(tiny, whole):
    """Upper rungs see task 0 alone; each begins with the weights of the one before."""
    found = {bits: read(whole / f"{bits}bit") for bits in (32, 4, 2)}
    assert [len(found[bits]["tasks"]) for bits in (32, 4, 2)] == [1, 1, 2]
    assert all((r["config"]["bitW"], r["config"]["abitW"]) == (bits, bits) for bits, r in found.items())
    files = rungs(options.make(**settings(tiny, whole, **SCHEDULE)))
    assert [rung.source_file for rung in files] == [None, *(str(whole / f"{b}bit" / "model_best.pt") for b in (32, 4))]
    nothing = options.make(**settings(tiny, whole.with_name("other"), **SCHEDULE | {"lr": 1e-30, "weight_decay": 0}))
    argv = arguments(settings(tiny, whole.with_name("other"), **SCHEDULE, lr=1e-30, weight_decay=0))
    assert command(argv) == 0  # where nothing is learned, every rung has the first one's weights
    weights = [
        checkpoint.read(whole.with_name("other") / f"{bits}bit" / "model_best.pt", "model")["model"]
        for bits in nothing.bit_schedule
    ]
    assert all(torch.equal(w["layer2.0.conv1.weight"], weights[0]["layer2.0.conv1.weight"]) for w in weights)


def test_activations_of_their_own(tiny, tmp_path):
    made = rungs(options.make(**settings(tiny, tmp_path, bit_schedule="32,8,2", abitW=4)))
    assert [(rung.bitW, rung.abitW) for rung in made] == [(32, 32), (8, 4), (2, 4)]


@pytest.mark.parametrize("step", [2, 6, 12])  # in the first rung, the second, and the second task of the last
def test_resume(step, tiny, whole, tmp_path, monkeypatch, capsys):
    job = tmp_path / "run"
    argv = arguments(settings(tiny, job, checkpoint_seconds=0, **SCHEDULE))
    with monkeypatch.context() as patch:
        kill_at(patch, history, "step_sums", step)
        with pytest.raises(Killed):
            command(argv)
    assert not (job / "2bit" / "results.json").exists()
    capsys.readouterr()
    assert command([*argv, "--resume"]) == 0
    for bits in (32, 4, 2):
        folders = job / f"{bits}bit", whole / f"{bits}bit"
        same(*(read(folder) for folder in folders), f"{bits}")
        same(*(checkpoint.read(folder / "model_best.pt", "model") for folder in folders), f"{bits}")
    lines = capsys.readouterr().out.splitlines()
    head = next(place for place, line in enumerate(lines) if line.split()[:2] == ["bits", "tasks"])
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["32/32", "4/4", "2/2"]
    assert float(lines[head + 3].split()[3]) == pytest.approx(read(job / "2bit")["average_accuracy"], abs=0.01)


def test_a_rung_is_not_overwritten(tiny, whole, capsys):
    assert run_main(command, arguments(settings(tiny, whole, **SCHEDULE))) == 2
    assert "holds another run" in capsys.readouterr().err
