"""Every registered method, penalty and quantizer, and each switch that touches devices, on a pretended GPU.

This belongs to the conformance suite: a new one is driven through it without another line. Each
case starts on the GPU, is killed in its last task, goes on on the CPU, is killed again, and ends on the GPU. No operation may
mix devices, no training step may wait, and the result is that of a plain run on the CPU, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.equal import Killed, read, same
from support.pretended_gpu import GpuFault, pretended_gpu
from support.tiny import arguments, settings, train

from lifequant import registry
from lifequant import train as training
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.data import augment, task
from lifequant.methods import importance
from lifequant.models.resnet import ResNet
from lifequant.results import results
from lifequant.training import history
from lifequant.training.run import Run

CASES: dict[str, dict[str, Any]] = {f"method {name}": {"method": name} for name in registry.names("method")}
OWN = {
    registry.method(name).defaults["penalty"] for name in registry.names("method")
}  # those are driven with the method
CASES |= {f"penalty {name}": {"penalty": name} for name in registry.names("penalty") if name not in OWN}
CASES |= {
    "switches": {
        "distill": 1,
        "ema": 0.9,
        "freeze_oscillating": 0.02,
        "nme": True,
        "head_epochs": 1,
        "bn_reestimate": 2,
    },
    "epochs": {"val_fraction": 0.25, "num_epochs": 2, "eval_every": 1, "cache": "mmap", "on_nan": "stop", "ema": 0.9},
    "encoded": {"method": "derpp", "cache": "encoded"},
    "photographs": {"method": "derpp", "augment": "reference", "nme": True},
    "amp": {
        "method": "replay",
        "amp": "bf16",
        "augment": "resized_crop",
        "buffer_size": 8,
        "replay_codec": "webp",
        "replay_selection": "herding",
    },
}
MAY_DIFFER = {"config", "history", "warnings"}  # the device; times; what the host said of them


@pytest.fixture(scope="module", autouse=True)
def resnet8():
    """A network with the layers of a ResNet-20, in less time."""
    registry.names("model")
    with mock.patch.dict(registry._registered["model"], {"resnet8": partial(ResNet, 8)}):
        yield


def small(more: dict[str, Any]) -> dict[str, Any]:
    least = {"method": "ours", "target_model": "resnet8", "image_size": 8, "train_batch_size": 12, "print_freq": 1}
    return {**least, "checkpoint_seconds": 0, **more}


def train_until(step: int, tiny: Any, job: Path, **more: Any) -> None:
    """Until the run dies before that step of its last task."""
    real = training.training_step

    def dying(run: Run, *args: Any) -> torch.Tensor:
        if run.task_index == run.num_tasks - 1 and run.step == step:
            raise Killed
        return real(run, *args)

    with mock.patch.object(training, "training_step", dying), pytest.raises(Killed):
        command(arguments(settings(tiny, job, **more)))


def same_state(job: Path, other: Path) -> None:
    for name, kind in (("last.pt", "run"), ("model_best.pt", "model")):
        states = [checkpoint.read(folder / "checkpoint" / name, kind) for folder in (job, other)]
        for key in states[0].keys() - MAY_DIFFER:
            same(*(state[key] for state in states), f"{name}/{key}")
    for key in ("top1", "top5", "top1_masked", "quantization_error"):
        same(*(read(folder)[key] for folder in (job, other)), key)


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a case's run on the CPU, each made once."""
    made: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp("plain") / "run"
            train(tiny, made[case], **small(CASES[case]))
        return made[case]

    return run


@pytest.mark.parametrize("case", CASES)
def test_as_on_the_cpu(case, plain, tiny, tmp_path):
    flags, job = small(CASES[case]), tmp_path / "run"
    with pretended_gpu() as gpu:
        train_until(1, tiny, job, device="cuda", **flags)
    assert gpu.operations > 1000 and gpu.waits > 0
    train_until(2, tiny, job, device="cpu", resume=True, **flags)
    with pretended_gpu() as gpu:
        train(tiny, job, device="cuda", resume=True, **flags)
    assert gpu.operations > 1000
    same_state(job, plain(case))


def test_quantizers(tiny, tmp_path):
    """One step and the evaluation with each."""
    for quantizer in registry.names("quantizer"):
        flags = small({"method": "original", "quantizer": quantizer, "num_tasks": 1, "train_batch_size": 32})
        train(tiny, tmp_path / f"{quantizer}_cpu", **flags)
        with pretended_gpu():
            train(tiny, tmp_path / quantizer, device="cuda", **flags)
        same_state(tmp_path / quantizer, tmp_path / f"{quantizer}_cpu")


@pytest.mark.parametrize(("former", "method"), [("ours", "ours"), ("ewc", "ewc"), ("ewc", "mas")])
def test_fork(former, method, plain, tiny, tmp_path):
    """From a run on the CPU. Task 0 is the same with both methods, so the fork ends as a run with the method does."""
    fork = {"start_task": 1, "from": plain(f"method {former}"), "device": "cuda"}
    with pretended_gpu():
        train(tiny, tmp_path / "run", **small({"method": method}), **fork)
    same_state(tmp_path / "run", plain(f"method {method}"))


def with_item(real: Any) -> Any:
    return lambda logits, y, terms: (terms.sum().item(), real(logits, y, terms))[1]


def with_cpu_tensor(real: Any) -> Any:
    return lambda run, batch: real(run, batch._replace(y=batch.y + torch.zeros(len(batch.y)).long()))


def with_mask(real: Any) -> Any:
    return lambda images, *more: (images[images[:, 0, 0, 0] > 0], real(images, *more))[1]


def with_branch(real: Any) -> Any:
    return lambda run, batch: real(run, batch) if batch.y.sum() >= 0 else None


def with_generator(real: Any) -> Any:
    return lambda images, *more: real(images, *more) + torch.rand(1, device=images.device, generator=torch.Generator())


def with_pageable_memory(real: Any) -> Any:
    return lambda values, device: values.to(device)


FAULTS = [
    (history, "step_sums", with_item, "_local_scalar_dense: the training step waits"),
    (Run, "with_teacher", with_cpu_tensor, "add: tensors on different devices"),
    (task, "normalize", with_mask, "index: a mask"),
    (Run, "with_teacher", with_branch, "waits for the GPU"),
    (task, "normalize", with_generator, "a CPU generator"),
    (augment, "send", with_pageable_memory, "to() to the GPU: the training step waits"),
]


@pytest.mark.parametrize(("where", "name", "plant", "message"), FAULTS, ids=[fault[2].__name__ for fault in FAULTS])
def test_finds_planted_faults(where, name, plant, message, tiny, tmp_path):
    flags = small({"num_tasks": 1, "device": "cuda"})
    planted = plant(getattr(where, name))
    with mock.patch.object(where, name, planted), pytest.raises(GpuFault) as error, pretended_gpu():
        train(tiny, tmp_path / "run", **flags)
    assert message in str(error.value)


@pytest.mark.parametrize("method", ["ours", "lwf"])
def test_finds_a_state_left_on_the_cpu(method, tiny, tmp_path):
    flags = small({"method": method})
    train_until(1, tiny, tmp_path / "run", **flags)
    with (
        mock.patch.object(checkpoint, "to_device", lambda state, device: state),
        pytest.raises(GpuFault, match="devices"),
        pretended_gpu(),
    ):
        train(tiny, tmp_path / "run", device="cuda", resume=True, **flags)


@pytest.fixture
def backend_flags():
    """What a run on a GPU sets has its former values afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    former = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = former


@pytest.mark.parametrize(("flags", "used"), [({}, "tf32"), ({"tf32": False}, "float32"), ({"amp": "bf16"}, "bfloat16")])
def test_tf32(flags, used, tiny, tmp_path, monkeypatch, backend_flags):
    """A training step may use it; evaluation and importances never do."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    seen: dict[str, set[bool]] = {}

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).update(backend.allow_tf32 for backend in backends)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watch(training, "training_step")
    watch(results, "evaluate")
    watch(importance, "image_means")
    with pretended_gpu():
        found = train(tiny, tmp_path / "run", device="cuda", **small({"method": "ours", **flags}))
    stepped = flags.get("tf32", True)
    assert seen == {"training_step": {stepped}, "evaluate": {False}, "image_means": {False}}
    assert found["arithmetic"] == {"training": used, "evaluation": "float32"} and found["device"] == "pretended"
    assert torch.backends.cudnn.benchmark
