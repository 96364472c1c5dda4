"""Two small tasks, networks of float64 and a plain training loop, for tests of methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lifequant import options, registry
from lifequant.data.task import Batch, Task
from lifequant.methods.base import LifelongMethod
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.layers import Scheme
from support.small_net import SmallNet

CLASSES, SIZE = 5, 8


def network(kind: str = "lsq") -> nn.Module:
    """Of float64, in training mode, with BatchNorm statistics that are not those of a new network."""
    torch.manual_seed(0)
    if kind == "float":
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
        ).double()
    else:
        family = registry.quantizer(kind.split()[0])
        model = SmallNet(Scheme(family, family, per_channel="per_channel" in kind)).double()
    x = torch.randn(16, 3, 8, 8).double()
    calibrate_network(model, x)
    model.train()(x)
    return model


def make(name: str, **flags: Any) -> LifelongMethod:
    return registry.method(name)(options.make(method=name, **flags))


def make_task(place: int = 0) -> Task:
    """Task 0: 20 images of the classes 0, 1, 2. Task 1: 12 of the classes 2 and 3, and six stored ones of 0 and 1."""
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.tensor([i % 3 for i in range(20)] + [2 + i % 2 for i in range(20)])
    none = torch.tensor([], dtype=torch.int64)
    if place == 0:
        return Task(0, [0, 1, 2], images, labels, torch.arange(20), none, none, CLASSES, SIZE)
    replay = torch.tensor([0, 1, 3, 4, 6, 7])
    return Task(place, [2, 3], images, labels, torch.arange(20, 32), replay, torch.arange(20), CLASSES, SIZE, 6)


def batch_of(task: Task, step: int, teacher: nn.Module | None = None) -> Batch:
    places = torch.arange(step * SIZE, (step + 1) * SIZE) * 5 % len(task.pool)
    rows = task.pool[places]
    x, y = task.batch(rows)
    batch = Batch(x, y, places >= len(task.new_rows), rows)
    if teacher is None:
        return batch
    with torch.no_grad():
        return batch._replace(teacher=teacher(x) if task.task_index else torch.zeros(len(x), CLASSES).double())


def losses(method: LifelongMethod, model: nn.Module, batch: Batch, logits: Tensor | None = None) -> Tensor:
    logits = model(batch.x) if logits is None else logits
    penalty = method.penalty(model) + method.output_penalty(logits, batch)
    return method.task_loss(logits, batch) + method.config.ll_lambda * penalty


def steps(
    method: LifelongMethod,
    model: nn.Module,
    task: Task,
    count: int = 3,
    first: int = 0,
    teacher: nn.Module | None = None,
    loss_of: Callable[[LifelongMethod, nn.Module, Batch], Tensor] = losses,
) -> list[float]:
    """A plain training loop; the losses."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.05), []
    for step in range(first, first + count):
        optimizer.zero_grad()
        loss = loss_of(method, model, batch_of(task, step, teacher))
        loss.backward()
        method.after_backward(model)
        optimizer.step()
        method.after_step(model, 1.0)
        seen.append(loss.item())
    return seen


def play(name: str, model: nn.Module, **flags: Any) -> tuple[LifelongMethod, nn.Module]:
    """A method that has seen task 0 and begun task 1, and its teacher."""
    method = make(name, **flags)
    method.begin_task(model, make_task(0))
    steps(method, model, make_task(0), teacher=copy.deepcopy(model))
    method.end_task(model, make_task(0))
    method.begin_task(model, make_task(1))
    return method, copy.deepcopy(model).eval()


def move(model: nn.Module, by: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.rand(p.shape, generator=generator).double()


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "_quant." not in name]


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights_of(model), retain_graph=True)])
