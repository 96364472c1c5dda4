"""What a step asks of a GPU outside of its compiled part, counted on a pretended one."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from support.launches import CASES, SMALL, count_step
from support.small_tasks import batch_of, losses, make, make_task, network
from support.tiny import train

from lifequant import options, registry
from lifequant import train as training
from lifequant.models.resnet import ResNet
from lifequant.qat.oscillations import Oscillations
from lifequant.training.compiling import keep_in_place


@pytest.mark.parametrize(("most", "flags"), CASES)
def test_launches(most, flags, tiny, tmp_path):
    """In a step of ResNet-20, its batch and its sums included."""
    counts = count_step(tiny, tmp_path / "run", **SMALL | flags)
    assert 20 < sum(counts.values()) <= most, counts.most_common()


def test_a_loop_over_layers_is_seen(tiny, tmp_path):
    """The counter's own test: nothing is compiled, so the whole step counts."""
    with mock.patch("lifequant.train.compile_step"):
        assert sum(count_step(tiny, tmp_path / "run", **SMALL).values()) > 1000


@pytest.mark.parametrize(
    ("flags", "copied"),
    [
        ({"loss": "ball"}, {"x", "y"}),
        ({"method": "ewc"}, {"x", "y"}),
        ({"method": "replay", "penalty": "proxq_function", "distill": 1}, {"x", "y", "teacher", "rows", "is_replay"}),
    ],
)
def test_inputs_of_a_cuda_graph(flags, copied, tiny, tmp_path, monkeypatch):
    """Only the batch is: all else lies where it is, and a graph reads it there. One graph serves all tasks."""
    compile_, train_task, graphs = torch.compile, training.train_task, []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        graphs.append({n.name for n in inputs if not n.meta["tensor_dict"].get("_dynamo_static_input_type")})
        return graph.forward

    def in_place(run: Any, task: Any) -> None:
        keep_in_place(run)
        train_task(run, task)

    monkeypatch.setattr(torch, "compile", partial(compile_, backend=backend, fullgraph=True))
    monkeypatch.setattr(training, "train_task", in_place)
    train(tiny, tmp_path / "run", **SMALL | flags, compile="on")
    of_step = [{name.rsplit("_args_0_")[-1] for name in graph} for graph in graphs if len(graph) > 1]
    assert of_step == [copied]


def weights_after(compiled: bool, method: str = "ours", **flags: Any) -> torch.Tensor:
    """All that two tasks of three steps leave in the model and in what watches it."""
    config = options.make(method=method, **flags)
    watch = Oscillations(config.freeze_oscillating) if config.freeze_oscillating else None
    lifelong = make(method, **flags)
    penalty = lifelong if config.penalty == "none" else registry.penalty(config.penalty)(config)
    graphs: list[Any] = []
    if compiled:
        part = watch or penalty
        for name in part.compilable:
            backend = lambda graph, _: (graphs.append(graph), graph.forward)[1]  # noqa: E731
            setattr(part, name, torch.compile(getattr(part, name), backend=backend, fullgraph=True, dynamic=False))
    model = network("proxq")
    for place in range(2):
        task, optimizer = make_task(place), torch.optim.SGD(model.parameters(), lr=0.05)
        for part in dict.fromkeys((lifelong, penalty)):
            part.begin_task(model, task)
        if watch:
            watch.begin_task(model)
        for step in range(4):
            optimizer.zero_grad()
            losses(lifelong, model, batch_of(task, step)).backward()
            penalty.after_backward(model)
            optimizer.step()
            penalty.after_step(model, 1 / (step + 1))
            if watch:
                watch.after_step(model)
        penalty.end_task(model, task)
    assert len(graphs) == (len((watch or penalty).compilable) if compiled else 0)
    kept = [*(watch.state.values() if watch else ()), *(t for t in vars(penalty).values() if torch.is_tensor(t))]
    return torch.cat([value.detach().double().flatten() for value in [*model.state_dict().values(), *kept]])


@pytest.mark.parametrize(
    "flags",
    [{"method": "si"}, {"method": "rwalk", "rwalk_every": 2}, {"penalty": "proxq_step"}, {"freeze_oscillating": 0.003}],
)
def test_compiled_parts(flags):
    """As not compiled, to the bit; one graph of each serves all steps and tasks."""
    assert torch.equal(weights_after(True, **flags), weights_after(False, **flags))


def test_every_compilable_part_is_tested():
    parts = {name for kind in ("method", "penalty") for name in registry.names(kind)}
    named = {n for kind in ("method", "penalty") for n in registry.names(kind) if getattr(registry, kind)(n).compilable}
    assert parts > named == {"si", "rwalk", "proxq_step"}


def test_a_compiled_float_run(tiny, tmp_path):
    """By torch's own compiler: the task loss is the whole loss there, and keeps its gradient."""
    with mock.patch.dict(registry._registered["model"], {"resnet8": partial(ResNet, 8)}):
        flags = SMALL | {"method": "original", "bitW": 32, "target_model": "resnet8", "num_tasks": 1}
        accuracies = [train(tiny, tmp_path / how, **flags, compile=how)["top1"] for how in ("on", "off")]
    assert accuracies[0] == accuracies[1]
