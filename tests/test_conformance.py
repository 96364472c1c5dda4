"""Every registered method and quantizer: two tiny tasks, what a run leaves, and interruption anywhere.

test_pretended_gpu.py drives each through a pretended GPU.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.contract import PAGES, blame, same_as_whole
from support.equal import Killed, kill_at, read, same
from support.tiny import TRAIN, Tiny, arguments, settings, train

import lifequant
from lifequant import registry
from lifequant import train as training
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.models.resnet import ResNet
from lifequant.registry import quantizer_class
from lifequant.results import results
from lifequant.training import history, task_end

METHODS = registry.names("method")
PAIRS = [(name, registry.method(name).defaults["quantizer"]) for name in METHODS]
PAIRS += [("replay", name) for name in registry.names("quantizer") if ("replay", name) not in PAIRS]

KEYS = {
    "schema", "config", "tasks", "top1", "top5", "top1_masked", "average_accuracy", "average_accuracy_weighted",
    "average_incremental_accuracy", "forgetting", "forgetting_rate", "bwt", "fwt", "space_shift",
    "quantization_error", "max_codes_per_tensor", "code_histograms", "memory_bytes", "seconds", "seconds_by_part",
    "images_per_second", "warnings", "versions", "device", "arithmetic",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Callable[..., Path]:
    """The folder of an uninterrupted run, each made once."""
    made: dict[tuple, Path] = {}

    def run(method: str, quantizer: str, **more: Any) -> Path:
        key = (method, quantizer, *sorted(more.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            with blame(method, quantizer, more.get("penalty")):
                train(tiny, made[key], method=method, quantizer=quantizer, **more)
        return made[key]

    return run


def shape(matrix: list) -> tuple[int, ...]:
    if not isinstance(matrix, list):
        return ()
    inner = {shape(row) for row in matrix}
    assert len(inner) == 1
    return (len(matrix), *inner.pop())


@pytest.mark.parametrize(("method", "quantizer"), PAIRS)
def test_two_tasks(method, quantizer, whole):
    """Finite losses; results.json has every key, in the right shape; no tensor has more codes than its bits allow."""
    job = whole(method, quantizer)
    found = read(job)
    assert set(found) >= KEYS
    joint = registry.method(method).joint
    rows = 1 if joint else 2
    for name in ("top1", "top5", "top1_masked", "quantization_error"):
        assert shape(found[name]) == (rows, 2), name
    assert all(0 <= x <= 100 for name in ("top1", "top5", "top1_masked") for row in found[name] for x in row)
    assert all(x >= 0 for row in found["quantization_error"] for x in row) and found["quantization_error"][0][0] > 0
    for layer, matrix in found["space_shift"].items():
        assert shape(matrix) == (rows, rows) and all(matrix[t][t] == 0 for t in range(rows)), layer
    assert len(found["space_shift"]) == 20 and (joint or found["space_shift"]["layer2.0.conv1"][0][1] > 0)
    undefined = {"average_incremental_accuracy", "forgetting", "forgetting_rate", "bwt", "fwt"}
    may_be_null = undefined if joint else {"forgetting_rate"}  # a task whose best accuracy is 0 has no rate
    assert {name for name in KEYS if found[name] is None} <= may_be_null

    stored = registry.method(method).defaults["replay"]
    kept = 4 * round(0.2 * TRAIN)  # of the four classes of task 0; two of them are in task 1 as well
    sizes = [(t["id"], len(t["classes"]), t["train_images"], t["test_images"]) for t in found["tasks"]]
    assert sizes == [(0, 4, 32, 16), (1, 4, 32, 16)]
    assert [t["replay_images"] for t in found["tasks"]] == [0, kept // 2 if stored else 0]
    memory = found["memory_bytes"]
    assert set(memory) >= {"packed_model", "replay", "importance", "reference", "logits", "average", "oscillation"}
    assert memory["replay"] == (kept * 3 * 16 * 16 if stored else 0)
    most = 300_000 if quantizer_class(quantizer).exceeds_bits else 160_000
    of_quantizer = f"quantizer {quantizer!r}: more values than its bits allow ({PAGES['quantizer']})"
    assert 130_000 < memory["packed_model"] < most, of_quantizer  # 0.27 M weights of half a byte, BatchNorm in float

    codes, histograms = found["max_codes_per_tensor"], found["code_histograms"]
    assert len(codes) == 40 and set(codes) == set(histograms)  # 20 weights, 19 ReLUs and the head's input
    for name, entry in codes.items():
        edge = name.split(".")[0] in ("conv1", "fc")
        over = quantizer_class(quantizer).exceeds_bits and name.endswith("weight_quant")
        assert entry["bits"] == (8 if edge else 4) and entry["codes"] > 1, name
        assert over or entry["codes"] <= 2 ** entry["bits"], f"{name}, {of_quantizer}"
        counts = histograms[name]["counts"]
        assert sum(n > 0 for n in counts) == entry["codes"], name
        assert over or len(counts) <= 2 ** entry["bits"], name
    assert sum(histograms["conv1.weight_quant"]["counts"]) == 16 * 3 * 9
    assert found["config"]["method"] == found["config"]["ll_method"] == method
    assert not {"job_dir", "data_dir", "csv_dir", "cache_dir"} & set(found["config"])
    assert found["versions"]["torch"] == torch.__version__ and found["seconds"] > 0 and found["images_per_second"] > 0

    state = checkpoint.read(job / "checkpoint" / "last.pt", "run")
    assert len(state["history"]["training"]) == rows
    assert all(math.isfinite(x) for task in state["history"]["training"] for x in task.values())
    assert all(t.isfinite().all() for t in state["model"].values())
    held = state["history"]["training"][-1]["penalty"]
    has_penalty = registry.method(method).has_penalty  # a penalty of the method's own
    expected = has_penalty or found["config"]["penalty"] not in ("none", "proxq_step")
    assert (held > 0) == expected, (
        f"method {method!r}: its penalty is {held:g} in the last task, where has_penalty is {has_penalty} ({PAGES['method']})"
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_pair(method, tiny, tmp_path, monkeypatch):
    """One step of each of two tasks, with every quantizer, on a ResNet-8: what a run does with one works with all."""
    registry.names("model")
    monkeypatch.setitem(registry._registered["model"], "resnet8", partial(ResNet, 8))
    for quantizer in registry.names("quantizer"):
        more = {"method": method, "quantizer": quantizer, "train_batch_size": 64, "target_model": "resnet8"}
        with blame(method, quantizer):
            found = train(tiny, tmp_path / quantizer, **more)
        assert all(math.isfinite(value) for row in found["top1"] for value in row)
        state = checkpoint.read(tmp_path / quantizer / "checkpoint" / "last.pt", "run")
        assert all(math.isfinite(x) for task in state["history"]["training"] for x in task.values()), quantizer
        assert all(t.isfinite().all() for t in state["model"].values()), quantizer


def same_runs(job: Path, other: Path) -> None:
    for name, kind in (("last.pt", "run"), ("task0.pt", "run"), ("model_best.pt", "model")):
        same(*(checkpoint.read(folder / "checkpoint" / name, kind) for folder in (job, other)), name)
    same(read(job), read(other), "results.json")


def interrupted(tiny: Tiny, job: Path, monkeypatch: pytest.MonkeyPatch, kill: tuple, **more: Any) -> None:
    """A run that is killed, then resumed by the same command with --resume."""
    argv = arguments(settings(tiny, job, checkpoint_seconds=0, **more))
    with monkeypatch.context() as patch, blame(more["method"], more["quantizer"], more.get("penalty")):
        kill_at(patch, *kill)
        with pytest.raises(Killed):
            command(argv)
    assert not (job / "results.json").exists()
    with blame(more["method"], more["quantizer"], more.get("penalty"), resumed=True):
        assert command([*argv, "--resume"]) == 0


IN_TASK_1 = 7  # task 0 has 4 steps


@pytest.mark.parametrize(("method", "quantizer"), PAIRS)
def test_resume(method, quantizer, tiny, whole, tmp_path, monkeypatch):
    """Killed in a step after the optimizer's, in mid-epoch, the second task where there is one."""
    call = 4 if registry.method(method).joint else IN_TASK_1
    kill = (history, "step_sums", call)
    interrupted(tiny, tmp_path / "run", monkeypatch, kill, method=method, quantizer=quantizer)
    straight = whole(method, quantizer)
    same_as_whole(method, lambda: same_runs(tmp_path / "run", straight))


MOMENTS = {
    "first step": (history, "step_sums", 1),
    "second step": (history, "step_sums", 2),
    "evaluation after task 0": (results, "evaluate", 1),
    "writing the checkpoint of task 0": (training, "save", 5),
    "first step of task 1": (history, "step_sums", 5),
    "evaluation after task 1": (results, "evaluate", 2),
    "results": (results, "assemble", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resume_at_any_moment(moment, tiny, whole, tmp_path, monkeypatch):
    interrupted(tiny, tmp_path / "run", monkeypatch, MOMENTS[moment], method="ours", quantizer="proxq")
    same_runs(tmp_path / "run", whole("ours", "proxq"))


ALL_PARTS = {
    "distill": 1, "ema": 0.9, "head_epochs": 1, "nme": True, "bn_reestimate": 2, "freeze_oscillating": 0.004,
    "act_quantizer": "lsqplus", "layer_bits": "layer3.*=3/2,fc=6", "per_channel": True,
    "memory_budget": "8MB", "replay_selection": "loss", "replay_codec": "webp",
}  # fmt: skip


WITH_PENALTY = {
    "proxq_function": ALL_PARTS,
    "proxq_step": {"val_fraction": 0.25, "ema": 0.9, "optimizer": "adamw"},
    "proxq_published": {
        "buffer_size": 8,
        "replay_selection": "herding",
        "warmup_epochs": 1,
        "lr": 0.005,
        "optimizer": "adam",
    },
}


@pytest.mark.parametrize(
    "more",
    [{"penalty": name, **WITH_PENALTY.get(name, {})} for name in registry.names("penalty") if name != "proxq"],
    ids=lambda more: more["penalty"],
)
def test_resume_with_other_parts(more, tiny, whole, tmp_path, monkeypatch):
    """Every penalty but the default one of ours, with switches and optimizers that hold state of their own."""
    more = {**more, "num_epochs": 2, "method": "ours", "quantizer": "proxq"}
    interrupted(tiny, tmp_path / "run", monkeypatch, (history, "step_sums", 14), **more)
    same_runs(tmp_path / "run", whole(**more))


def test_resume_keeps_the_best_epoch(tiny, tmp_path, monkeypatch):
    """Killed in the second epoch of each task, the first one being best."""
    monkeypatch.setattr(task_end, "validation_top1", lambda *args: 50.0)
    more = {"method": "replay", "quantizer": "lsq", "num_epochs": 2, "val_fraction": 0.25}  # 3 steps an epoch, then 4
    train(tiny, tmp_path / "whole", **more)
    for step in (5, 12):
        interrupted(tiny, tmp_path / str(step), monkeypatch, (history, "step_sums", step), **more)
        same_runs(tmp_path / str(step), tmp_path / "whole")


@pytest.mark.parametrize("num_tasks", [1, 2])
@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_divergence(lr, num_tasks, tiny, tmp_path, capsys):
    """What is not finite ends the run with one line that names the remedy, whether the loss shows it or the tests do."""
    argv = arguments(settings(tiny, tmp_path / "run", method="ours", num_tasks=num_tasks, lr=lr))
    assert run_main(command, argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "diverged in task 0, step " in error and "smaller --lr" in error


def test_sigkill(tiny, whole, tmp_path):
    """A process that is killed, in the second task, and one that goes on."""
    job, source = tmp_path / "run", str(Path(lifequant.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    more = {"method": "ours", "quantizer": "proxq", "num_epochs": 3}
    argv = arguments(settings(tiny, job, checkpoint_seconds=0, **more))
    log = (tmp_path / "output").open("w")
    process = subprocess.Popen([sys.executable, "-m", "lifequant", *argv], env=environment, stdout=log, stderr=log)
    last, end = job / "checkpoint" / "last.pt", job / "checkpoint" / "task0.pt"
    deadline = time.monotonic() + 120
    try:
        while not (end.exists() and last.stat().st_mtime_ns > end.stat().st_mtime_ns + 100_000_000):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = checkpoint.read(last, "run")
    assert (state["task_index"], process.returncode) == (1, -signal.SIGKILL) and 0 < state["step"] < 15
    assert run_main(command, [*argv, "--resume"]) == 0
    same_runs(job, whole(**more))
