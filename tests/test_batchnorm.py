"""BatchNorm's statistics, estimated anew, against sums by hand."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.small_net import small_net
from torch import Tensor, nn

from lifequant import options
from lifequant.data.augment import CIFAR
from lifequant.data.task import Task
from lifequant.qat.batchnorm import reestimate_bn
from lifequant.train import finish_training


class WithDropout(nn.Module):
    """Dropout before the second BatchNorm: in train mode it would change what that sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=None)
        self.bn3 = nn.BatchNorm1d(5, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.bn1(self.conv1(x)).relu())
        return self.bn3(self.bn2(self.conv2(x)).mean((2, 3)))


def statistics(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of each channel of [N, C, H, W]."""
    rows = y.transpose(1, 0, 2, 3).reshape(y.shape[1], -1)
    return rows.mean(1), ((rows - rows.mean(1, keepdims=True)) ** 2).sum(1) / (rows.shape[1] - 1)


def test_a_run_takes_the_statistics_of_what_it_trained_on():
    """Augmented images: those that are not have less padding at their edges, and other statistics."""
    images, every = torch.full((10, 3, 8, 8), 200, dtype=torch.uint8), torch.arange(10)
    task = Task(0, [0], images, torch.zeros(10, dtype=torch.int64), every, every[:0], every[:0], 1, 4)
    task.augment = lambda taken, noise: torch.zeros_like(taken)
    model, clock = nn.BatchNorm2d(3), SimpleNamespace(part=lambda *names: contextlib.nullcontext())
    run = SimpleNamespace(
        config=options.make(bn_reestimate=2, train_batch_size=4),
        model=model,
        best={},
        ema=None,
        timer=clock,
        task_index=0,
        task_sizes=[(10, 0)],
    )
    finish_training(run, task)
    np.testing.assert_allclose(model.running_mean, -np.array(CIFAR.mean) / np.array(CIFAR.std), rtol=1e-5)


def test_reestimated_statistics():
    """Batches count alike; the second BatchNorm sees what the first makes of each batch's own statistics."""
    torch.manual_seed(0)
    model = WithDropout()
    for bn in (model.bn1, model.bn2):
        bn.running_mean.fill_(5)
        bn.running_var.fill_(float("nan"))
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    batches = [torch.randn(n, 3, 7, 7) * scale for n, scale in ((4, 1.0), (4, 3.0), (2, 0.5))]
    assert reestimate_bn(model, iter(batches)) == 3

    first, second = [], []
    for x in batches:
        y = F.conv2d(x.double(), model.conv1.weight.double(), model.conv1.bias.double()).detach().numpy()
        mean, var = statistics(y)
        first.append((mean, var))
        n = y.size / 4
        z = (y - mean[:, None, None]) / np.sqrt(var * (n - 1) / n + 1e-5)[:, None, None]
        weight, bias = (p.detach().double().numpy()[:, None, None] for p in (model.bn1.weight, model.bn1.bias))
        z = torch.from_numpy(np.maximum(z * weight + bias, 0))
        y = F.conv2d(z, model.conv2.weight.double(), model.conv2.bias.double()).detach().numpy()
        second.append(statistics(y))
    for bn, found in ((model.bn1, first), (model.bn2, second)):
        np.testing.assert_allclose(bn.running_mean, np.mean([m for m, _ in found], 0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bn.running_var, np.mean([v for _, v in found], 0), rtol=1e-4, atol=1e-5)


def rest(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in model.state_dict().items() if not n.endswith(("running_mean", "running_var"))}


def test_reestimation_changes_nothing_else():
    model = small_net()
    model(torch.randn(4, 3, 8, 8)).sum().backward()  # num_batches_tracked 1
    model.bn1.eval()
    model.bn2.momentum = 0.3
    before, was = rest(model), {n: v.clone() for n, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    reestimate_bn(model, [torch.randn(4, 3, 8, 8) for _ in range(2)])
    assert all(torch.equal(v, before[n]) for n, v in rest(model).items())
    assert model.bn1.num_batches_tracked == 1
    assert not torch.equal(model.bn1.running_mean, was["bn1.running_mean"])
    assert [m.training for m in model.modules()] == flags and not model.bn1.training and model.bn2.training
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, 0.3)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if g is not None)


@pytest.mark.parametrize("batches", [[], [torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8)]])
def test_failed_reestimation_leaves_the_model_as_it_was(batches):
    model = small_net().train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)):
        reestimate_bn(model, batches)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.bn1.momentum == 0.1 and model.training
