"""EWC, SI, MAS and LwF against avalanche-lib on the same float network, data and steps; -s shows the numbers.

Where the two differ by definition the conditions are those under which they agree: after the first task, one image a batch
(Avalanche squares, or takes the absolute value of, the batch's mean gradient), no BatchNorm (its MAS estimates in training
mode, its SI leaves BatchNorm out), nothing clamped. Avalanche's EWC has no factor 1/2, its SI has one, which ours has not.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small_tasks import CLASSES, make
from torch import Tensor, nn

pytest.importorskip("avalanche", reason="avalanche-lib is not installed: pip install -e .[peers]")

from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_tensor_classification_dataset as labelled
from avalanche.training import LearningWithoutForgetting
from avalanche.training.plugins import EWCPlugin, MASPlugin, SynapticIntelligencePlugin

from lifequant.data.task import Batch, Task, user_task
from lifequant.methods.importance import flat

WITHIN = 1e-5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, CLASSES)
    ).double()


def data(place: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(place)
    x, y = torch.randn(24, 3, 8, 8, generator=generator).double(), torch.randint(0, 3, (24,), generator=generator)
    return x, y + 2 * place


def task(place: int = 0) -> Task:
    if place == 0:
        return user_task(0, *data(0), num_classes=CLASSES)
    return user_task(1, *data(1), past_y=data(0)[1], num_classes=CLASSES)


def strategy(model: nn.Module, place: int) -> Any:
    """What Avalanche's plugins ask of a strategy."""
    x, y = data(place)
    return SimpleNamespace(
        model=model,
        device="cpu",
        train_mb_size=1,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        _criterion=F.cross_entropy,
        clock=SimpleNamespace(train_exp_counter=place, train_iterations=0),
        experience=SimpleNamespace(dataset=labelled(x, y, task_labels=0)),
        loss=torch.ones(()).double(),
    )


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)


def agree(name: str, ours: Tensor, theirs: Tensor) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"\n{name}: ours {ours.norm():.8g}, Avalanche {theirs.norm():.8g}, greatest relative difference {error:.2g}")
    assert theirs.abs().max() > 0 and error < WITHIN


def penalty_of(plugin: Any, model: nn.Module) -> Tensor:
    at = strategy(model, 1)
    plugin.before_backward(at)
    return at.loss.detach() - 1  # its MAS refuses a loss of 0


@pytest.mark.parametrize(("name", "factor"), [("ewc", 0.5), ("mas", 1.0)])
def test_importances(name, factor):
    model = network()
    ours, theirs = make(name), EWCPlugin(1.0) if name == "ewc" else MASPlugin(1.0)
    ours.begin_task(model, task())
    ours.end_task(model, task())
    theirs.after_training_exp(strategy(model, 0))
    importance = theirs.importances[0] if name == "ewc" else theirs.importance
    agree(f"{name}, importances", ours.importance, factor * flat(v.data for v in importance.values()))
    move(model)
    agree(f"{name}, penalty", ours.penalty(model).detach(), factor * penalty_of(theirs, model))


def copy_of(kept: dict[str, Any]) -> None:
    for value in kept.values():
        value.data = value.data.clone()


def test_si():
    """Ten steps of SGD; both read the same gradients.

    On the CPU what Avalanche keeps of the weights shares their memory (``param.detach().cpu().flatten()`` copies nothing),
    so that its path integral stays 0; here it is given copies.
    """
    model, at = network(), strategy(network(), 0)
    at.model = model
    ours = make("si", si_xi=0.01)
    theirs = SynapticIntelligencePlugin(si_lambda=2.0, eps=0.01)  # its penalty has a factor 1/2
    ours.begin_task(model, task())
    theirs.before_training_exp(at)
    copy_of(theirs.ewc_data[0])
    optimizer, (x, y) = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), data()
    for _ in range(10):
        theirs.before_training_iteration(at)
        copy_of(theirs.syn_data["old_theta"])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        ours.after_backward(model)
        optimizer.step()
        ours.after_step(model, 1.0)
        theirs.after_training_iteration(at)
    trajectory = flat(v.data for v in theirs.syn_data["trajectory"].values())
    agree("si, path integral", ours.path, -trajectory)
    ours.end_task(model, task())
    theirs.update_ewc_data(model, theirs.ewc_data, theirs.syn_data, float("inf"), set(), c=1, eps=0.01)
    for value in theirs.ewc_data[1].values():
        value.data = value.data.clamp(min=0).double()  # it clamps from above alone, in float32
    agree("si, importances", ours.importance, flat(v.data for v in theirs.ewc_data[1].values()))
    copy_of(theirs.ewc_data[0])
    move(model)
    agree("si, penalty", ours.penalty(model).detach(), penalty_of(theirs, model))


def test_lwf():
    """The former model's classes are those of task 0; temperature 2, weight 3."""
    former = network()
    ours, theirs = make("lwf", lwf_alpha=3), LearningWithoutForgetting(alpha=3, temperature=2)
    theirs.post_adapt(strategy(former, 0), strategy(former, 0).experience)
    model = copy.deepcopy(former)
    ours.begin_task(model, task(1))
    move(model)
    x, y = data(1)
    logits = model(x)
    rows = torch.arange(24)
    batch = Batch(x, y, rows < 0, rows, former(x).detach())
    distilled = ours.task_loss(logits, batch) - F.cross_entropy(logits, y)
    agree("lwf, distillation", distilled.detach(), theirs(x, logits, model).detach())
    slopes = [
        flat(torch.autograd.grad(v, model.parameters(), retain_graph=True))
        for v in (distilled, theirs(x, logits, model))
    ]
    agree("lwf, gradient", *slopes)
