"""Importances against loops over single images, penalties and the proximal step against formulas in numpy."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.fisher import CONVS, fisher_by_loop, gradients_at_quantized, make_task, network
from torch import nn

from lifequant import registry
from lifequant.data.task import Task
from lifequant.methods.base import LifelongMethod
from lifequant.methods.importance import at_quantized_weights, latent_weights, per_batch, per_sample
from lifequant.qat.weights import quantized_weights

ANCHORED = [name for name in registry.names("penalty") if name != "proxq_function"]  # those that hold weights


def penalty_of(name: str, model: nn.Module, task: Task | None = None, **config: float) -> LifelongMethod:
    """As a run has it after task 0 was trained and ``task`` has begun."""
    guard = registry.penalty(name)(SimpleNamespace(ll_lambda=config.get("ll_lambda", 1.0)))
    guard.begin_task(model, make_task(0))
    guard.begin_task(model, task or make_task())
    return guard


def move(model: nn.Module, by: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 0:
                p += by * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("quantizer", registry.names("quantizer"))
def test_per_sample(quantizer):
    """More images than are taken at a time; each image's own squared gradient, then the mean.

    In float64: in float32 a value at the border of two codes may fall on either side.
    """
    model, task = network(quantizer).double(), make_task()
    x, y = task.batch(torch.arange(40))
    x = x.double()
    found = per_sample(at_quantized_weights(model), [(x, y)])
    assert set(found) == set(CONVS)
    for name, expected in fisher_by_loop(model, x, y).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-12 * expected.max())


def test_per_batch():
    """Squared gradients of the means of batches of 8, 8 and 4 images; far below the per-sample values."""
    model, task = network(), make_task()
    x, y = task.batch(torch.arange(20))
    net = at_quantized_weights(model)
    found = per_batch(net, latent_weights(net), zip(x.split(8), y.split(8), strict=True))
    batches = [gradients_at_quantized(model, x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    samples = fisher_by_loop(model, x, y)
    for name in CONVS:
        expected = np.mean([b[name].numpy() ** 2 for b in batches], axis=0)
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-6 * expected.max())
        assert expected.mean() < samples[name].mean() / 2


@pytest.mark.parametrize("name", ANCHORED)
def test_zero_until_weights_move(name):
    """Nothing is held in task 0, wherever the weights go; in task 1 what was learned is."""
    model = network()
    guard = registry.penalty(name)(SimpleNamespace(ll_lambda=1.0))
    guard.begin_task(model, make_task(0))
    before = quantized_weights(model)
    move(model)
    assert guard.penalty(model) == 0
    moved = {key: p.clone() for key, p in model.named_parameters()}
    guard.after_step(model, 1.0)
    assert all(torch.equal(p, moved[key]) for key, p in model.named_parameters())
    assert any((value != before[key]).any() for key, value in quantized_weights(model).items())

    guard.begin_task(model, make_task())
    assert guard.penalty(model) == 0  # nothing has moved since the end of task 0
    move(model, 0.1)
    moved = {key: p.clone() for key, p in model.named_parameters()}
    penalty = guard.penalty(model)
    guard.after_step(model, 1.0)
    if name == "proxq_step":
        assert any((p != moved[key]).any() for key, p in model.named_parameters())
    else:
        assert penalty > 0
        penalty.backward()
        assert model.conv2.weight.grad.abs().sum() > 0


def test_proxq():
    """(kappa/2) sum F (w^q - w_s^q)^2: F of the classes 0 and 1, clipped at each layer's 99.9 % quantile."""
    model, task = network(), make_task()
    guard = penalty_of("proxq", model, task)
    gone = torch.tensor([row for row in range(12) if row % 3 != 2])
    fisher = fisher_by_loop(model, *task.batch(gone))
    kappa = (20 - 8) / (20 + 12)  # of 20 images of the classes 0 and 1, 8 are stored; 20 new and 12 stored ones
    former = quantized_weights(model)
    move(model, 0.1)
    now = quantized_weights(model)
    expected = 0.0
    for name in CONVS:
        clipped = np.minimum(fisher[name], np.quantile(fisher[name], 0.999))
        np.testing.assert_allclose(guard.importance[name], kappa / 2 * clipped, rtol=2e-3, atol=1e-6 * clipped.max())
        assert clipped.max() < 0.99 * fisher[name].max()
        expected += kappa / 2 * (clipped * (now[name] - former[name]).double().numpy() ** 2).sum()
    assert guard.penalty(model).item() == pytest.approx(expected, rel=1e-4)
    assert set(guard.anchor) == set(CONVS)  # no classifier, no BatchNorm


def test_proxq_paper():
    """Batch means over all replay images, quantized weights, no factor."""
    model, task = network(), make_task()
    guard = penalty_of("proxq_paper", model, task)
    x, y = task.batch(task.replay)
    batches = [gradients_at_quantized(model, x[i : i + 8], y[i : i + 8]) for i in (0, 8)]
    former = quantized_weights(model)
    move(model, 0.1)
    now = quantized_weights(model)
    expected = sum(
        (np.mean([b[n].numpy() ** 2 for b in batches], axis=0) * (now[n] - former[n]).double().numpy() ** 2).sum()
        for n in CONVS
    )
    assert guard.penalty(model).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("per_channel", [False, True])
def test_proxq_published(per_channel):
    """All parameters but the quantizers', latent; batch means over all replay images, in eval mode."""
    model, task = network("lsq", per_channel=per_channel), make_task()
    assert any(p.dim() == 1 for name, p in model.named_parameters() if name.endswith(".step_size")) == per_channel
    guard = penalty_of("proxq_published", model, task)
    assert model.training
    reference = copy.deepcopy(model).eval()
    x, y = task.batch(task.replay)
    squares = []
    for i in (0, 8):
        reference.zero_grad()
        F.cross_entropy(reference(x[i : i + 8]), y[i : i + 8]).backward()
        squares.append({n: p.grad.double().numpy() ** 2 for n, p in reference.named_parameters()})
    move(model)
    names = {n for n, p in model.named_parameters() if not n.endswith(".step_size")}
    assert {"conv1.weight", "bn1.bias", "fc.weight", "fc.bias"} <= names and set(guard.anchor) == names
    expected = sum(
        (
            np.mean([s[n] for s in squares], axis=0) * (p - reference.get_parameter(n)).detach().double().numpy() ** 2
        ).sum()
        for n, p in model.named_parameters()
        if n in names
    )
    assert guard.penalty(model).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("quantizer", ["proxq", "lsq"])
def test_proxq_step(quantizer):
    """In z: d = z - r, |d| <- min(|d|, h) + max(|d| - h, 0) / (1 + k (eta_t / eta_0) Fn); inside the cell all is free."""
    model, task = network(quantizer).double(), make_task()
    k, ratio = 0.7, 0.5
    former = {n: model.get_submodule(n).weight.detach().clone() for n in CONVS}
    quants = {n: model.get_submodule(n).weight_quant for n in CONVS}
    if quantizer == "lsq":
        for quant in quants.values():
            quant.step_size.data.fill_(0.1)  # cells as wide as the weights will move, so that some stay within
    r = {n: quants[n].codes(former[n]).double().numpy() for n in CONVS}
    gone = torch.tensor([row for row in range(12) if row % 3 != 2])
    x, y = task.batch(gone)
    task.batches = lambda rows, size: [(x.double(), y)]  # images in the network's precision
    guard = penalty_of("proxq_step", model, task, ll_lambda=k)
    fisher = fisher_by_loop(model, x.double(), y)
    move(model, 0.1)
    w = {n: model.get_submodule(n).weight.detach().clone() for n in CONVS}
    guard.after_step(model, ratio)
    inside = held = 0
    for n in CONVS:
        latent, quant = w[n].numpy(), quants[n]
        if quantizer == "proxq":
            c = quant.c.item()
            mean, std, cell = latent.mean(), latent.std(), c / quant.qp
        else:
            mean, std, cell = 0.0, 1.0, quant.step_size.item()
        z = (latent - mean) / std
        importance = np.minimum(fisher[n] / fisher[n].mean(), 10)
        d, h = z - r[n] * cell, cell / 2
        size = np.minimum(abs(d), h) + np.maximum(abs(d) - h, 0) / (1 + k * ratio * importance)
        expected = mean + std * (r[n] * cell + np.sign(d) * size)
        found = model.get_submodule(n).weight.detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        free = abs(d) < 0.999 * h
        assert (found[free] == latent[free]).all()
        inside, held = inside + free.sum(), held + (found != latent).sum()
    assert inside > 20 and held > 20


def test_proxq_step_importance(monkeypatch):
    """Relative to the layer's mean, at most 10."""
    generator = torch.Generator().manual_seed(3)
    heavy = {
        "conv1": torch.randn(4, 3, 3, 3, generator=generator),
        "conv2": torch.randn(6, 4, 3, 3, generator=generator),
    }
    heavy = {name: (3 * value).exp() for name, value in heavy.items()}
    monkeypatch.setattr("lifequant.penalties.base.per_sample", lambda *args: heavy)
    guard = penalty_of("proxq_step", network())
    for name, value in heavy.items():
        assert (value / value.mean()).max() > 10
        np.testing.assert_allclose(guard.importance[name], np.minimum((value / value.mean()).numpy(), 10), rtol=1e-5)


def test_nothing_to_estimate_from():
    """No class is gone, all of it is stored, or nothing is: no penalty; only the last is worth a warning."""
    warnings: list[str] = []
    tasks = [make_task(warnings=warnings, stored=30), make_task(warnings=warnings, stored=0)]
    same = make_task(warnings=warnings)
    same.classes = [0, 1, 2, 3]
    for task, count in ((tasks[0], 0), (same, 0), (tasks[1], 1)):
        model = network()
        guard = penalty_of("proxq", model, task)
        move(model, 0.1)
        assert guard.penalty(model) == 0 and len(warnings) == count
    assert "no replay image" in warnings[0]


@pytest.mark.parametrize("name", ANCHORED)
def test_state(name):
    """Written and read as a checkpoint is, it goes on the same; an estimate in its place leaves tensors where they were."""
    model = network()
    guard = penalty_of(name, model)
    file = io.BytesIO()
    torch.save(guard.state_dict(), file)
    file.seek(0)
    again = registry.penalty(name)(SimpleNamespace(ll_lambda=1.0))
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.memory_bytes() == guard.memory_bytes()
    move(model, 0.1)
    twin = copy.deepcopy(model)
    assert torch.equal(again.penalty(twin), guard.penalty(model))
    guard.after_step(model, 1.0)
    again.after_step(twin, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    places = {key: id(value) for key, value in guard.importance.items()}
    guard.begin_task(model, make_task())
    assert {key: id(value) for key, value in guard.importance.items()} == places


def test_memory_bytes():
    """conv1: 4x3x3x3 at 8 bits; conv2: 6x4x3x3 at 4 bits; a step of 4 bytes each. Importances are float32."""
    model = network()
    weights = 4 * 3 * 9 + 6 * 4 * 9
    packed = 4 * 3 * 9 + 6 * 4 * 9 // 2 + 2 * 4
    for name in ("proxq", "proxq_step", "proxq_paper"):
        assert penalty_of(name, model).memory_bytes() == {"importance": 4 * weights, "reference": packed}
    rest = 2 * (4 + 6) + 6 * 5 + 5  # BatchNorm, classifier
    everything = 4 * (weights + rest)
    assert penalty_of("proxq_published", model).memory_bytes() == {"importance": everything, "reference": everything}
