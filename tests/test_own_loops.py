"""Quantizers in a training loop of one's own: scales under a plain optimizer, and tensors of any shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant import calibrate, quantize_model, registry
from lifequant.qat.layers import fake_quants
from lifequant.quantizers.base import STEP_FLOOR, FakeQuant

NAMES = registry.names("quantizer")
KINDS = ("weight", "activation")
pytestmark = pytest.mark.filterwarnings("ignore:calibrate. .* input that no quantizer gave")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name: str, kind: str, channels: int | None = None, **options) -> FakeQuant:
    family = registry.quantizer(name, **options)
    quant = family.weight(4, channels) if kind == "weight" else family.activation(4)
    quant.calibrate(drawn(4, 3, 3, 3))
    return quant


def with_gradients(quant: FakeQuant, x: Tensor) -> list[Tensor]:
    """The values, and the gradients of ``x`` and of the quantizer's parameters."""
    x = x.detach().requires_grad_()
    y = quant(x)
    inputs = [x, *(p for p in quant.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("below", [0.0, -1e-9, -0.3, -100.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, "proxq with c"])
def test_a_scale_below_the_floor_is_the_floor(name, kind, below):
    """Values, codes and gradients are those of a scale that lies just above the floor, so the scale can come back."""
    options = {"learn_c": True} if name == "proxq with c" and kind == "weight" else {}
    name = name.split()[0]
    quant, other = (make(name, kind, **options) for _ in range(2))
    for p, q in zip(quant.scale_parameters(), other.scale_parameters(), strict=True):
        p.data.fill_(below)
        q.data.fill_(STEP_FLOOR)
    x = drawn(4, 3, 3, 3, seed=1)
    assert (quant.scale() > 0).all() and torch.equal(quant.codes(x), other.codes(x))
    for found, expected in zip(with_gradients(quant, x), with_gradients(other, x), strict=True):
        assert torch.equal(found, expected) and found.isfinite().all()


@pytest.mark.parametrize("name", ["lsq", "lsqplus"])
def test_a_plain_optimizer(name):
    """Steps fall below zero, as SGD alone takes them now and then; the network learns on, and they come back."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    q = quantize_model(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 5)), name, 8, 8)
    x, y = drawn(64, 3, 8, 8), torch.arange(64) % 5
    calibrate(q, x)
    optimizer = torch.optim.SGD(q.parameters(), 0.05, momentum=0.9)
    for i in range(150):
        if i == 10:
            with torch.no_grad():
                q[3].weight_quant.step_size.mul_(-0.1)
        loss = F.cross_entropy(q(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps = [quant.step_size.item() for _, quant in fake_quants(q)]
        assert all((quant.scale() > 0).all() for _, quant in fake_quants(q))
    assert min(steps) > STEP_FLOOR and loss < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, kind):
    """Empty tensors, one value, no dimension, and strides of any kind, with gradients."""
    quant = make(name, kind)
    for shape in ((0, 3, 4, 4), (2, 0), (0,)) if kind == "activation" else ():
        values, *gradients = with_gradients(quant, torch.empty(shape))
        assert values.shape == gradients[0].shape == shape and not any(g.any() for g in gradients[1:])
    for shape in ((), (1,), (1, 1)):
        assert with_gradients(quant, torch.full(shape, 0.5))[0].shape == shape
    x = drawn(4, 6, 5, 5, seed=1)
    strided = [x.transpose(1, 3), x[:, ::2], x.to(memory_format=torch.channels_last), x[:1].expand(4, 6, 5, 5)]
    for given in strided:
        for found, expected in zip(
            with_gradients(quant, given), with_gradients(quant, given.contiguous()), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
