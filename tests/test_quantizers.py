"""Every registered quantizer: few codes, consistent codes, steps set in place, gradients, whole graphs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from small_net import SmallNet
from torch import Tensor, nn

from lifequant import registry
from lifequant.losses import LOSSES
from lifequant.penalties import PENALTIES
from lifequant.quantizers.layers import Scheme, calibrate, quantized_weights
from lifequant.quantizers.proxq import BEST_C

NAMES = registry.names("quantizer")
BITS = (2, 3, 4, 5, 6, 8)
KINDS = ("weight", "activation")


def make(name: str, kind: str, bits: int, **options) -> nn.Module:
    return getattr(registry.quantizer(name, **options), kind)(bits)


def tensors() -> dict[str, Tensor]:
    random = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return {
        "random": random,
        "skewed": random.exp() - 0.2,
        "huge": 1e10 * random,
        "tiny": 1e-10 * random,
        "constant": torch.full((2, 8), 0.3),
        "zeros": torch.zeros(2, 8),
        "one element": torch.full((1, 1), -0.7),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_codes(name, bits, kind):
    """At most 2^b values, that codes and step repeat, whatever the data the step was set from and the data quantized."""
    for source, seen in tensors().items():
        for target, x in tensors().items():
            what = f"set from {source}, applied to {target}"
            seen, x = (seen.abs(), x.abs()) if kind == "activation" else (seen, x)
            quant = make(name, kind, bits)
            quant.calibrate(seen)
            assert quant.step().shape == () and quant.step() > 0, what
            x = x.clone().requires_grad_()
            values, codes = quant(x), quant.codes(x)
            assert values.shape == codes.shape == x.shape and not codes.is_floating_point(), what
            assert len(values.unique()) <= 2**bits and len(codes.unique()) <= 2**bits, what
            assert torch.isfinite(values).all(), what
            assert quant.qn <= codes.min() and codes.max() <= quant.qp and quant.qp - quant.qn < 2**bits, what
            torch.testing.assert_close(values, codes * quant.step(), rtol=1e-6, atol=0, msg=what)
            values.sum().backward()
            gradients = [x.grad, *(p.grad for p in quant.parameters() if p.requires_grad)]
            assert all(torch.isfinite(g).all() for g in gradients), what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_codes_use_the_range(name, kind):
    """Of a bell-shaped tensor, most codes at 2 to 4 bits; a larger number never has a smaller code."""
    x = torch.randn(20000, generator=torch.Generator().manual_seed(1))
    x = (x.abs() if kind == "activation" else x).sort().values.view(10, -1)
    for bits in (2, 3, 4):
        quant = make(name, kind, bits)
        quant.calibrate(x)
        codes = quant.codes(x)
        assert len(codes.unique()) > 2**bits / 2
        assert (codes.flatten().diff() >= 0).all() and (quant(x).flatten().diff() >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_calibrate_in_place(name, kind):
    """An optimizer made before keeps its parameters; other data, another step; 32 bits is the identity."""
    assert type(make(name, kind, 32)) is nn.Identity
    quant = make(name, kind, 4)
    before = {key: id(value) for key, value in quant.named_parameters()}
    x = torch.rand(8, 16) - (0.5 if kind == "weight" else 0)
    quant.calibrate(x)
    step = quant.step().clone()
    quant.calibrate(10 * x)
    assert {key: id(value) for key, value in quant.named_parameters()} == before
    assert quant.step().item() == pytest.approx(10 * step.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_lsq_step(bits, kind):
    """The lesser of 2 mean|v| / sqrt(qp), which binds at 2 bits, and of max|v| / qp, which binds at 8: nothing is
    clipped there, and the largest value has the largest code."""
    rng = np.random.default_rng(bits)
    v = rng.normal(size=(50, 20))
    v = np.abs(v) if kind == "activation" else v
    qp = 2 ** (bits - 1) - 1 if kind == "weight" else 2**bits - 1
    mean, cap = 2 * np.abs(v).mean() / np.sqrt(qp), np.abs(v).max() / qp
    quant = make("lsq", kind, bits).double()
    quant.calibrate(torch.tensor(v))
    assert quant.step().item() == pytest.approx(min(mean, cap), rel=1e-12)
    if bits == 2:
        assert mean < cap
    if bits == 8:
        assert cap < 0.5 * mean
        assert quant.codes(torch.tensor(v)).abs().max() == qp


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_lsq_gradient(bits, kind):
    """ds = g sum dy {qn, qp, round(v/s) - v/s}, g = 1/sqrt(N qp); dv = dy inside."""
    rng = np.random.default_rng(bits)
    v = rng.normal(size=(6, 5, 4))
    v = np.abs(v) if kind == "activation" else v
    dy = rng.normal(size=v.shape)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == "weight" else (0, 2**bits - 1)

    quant = make("lsq", kind, bits).double()
    quant.calibrate(torch.tensor(v))
    s = np.abs(v).max() / (1.5 * high)  # so that some are clipped at every bit-width
    with torch.no_grad():
        quant.size.fill_(s)
    x = torch.tensor(v, requires_grad=True)
    y = quant(x)
    y.backward(torch.tensor(dy))

    u = v / s
    inside = (u > low) & (u < high)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(y.detach(), s * np.round(np.clip(u, low, high)), rtol=1e-12)
    np.testing.assert_allclose(x.grad, dy * inside, rtol=1e-12)
    ds = np.where(inside, np.round(u) - u, np.clip(u, low, high))
    features = v.size if kind == "weight" else v[0].size  # of one image
    expected = (dy * ds).sum() / np.sqrt(features * high)
    np.testing.assert_allclose(quant.size.grad, expected, rtol=1e-10)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_proxq_gradient(bits):
    """Central differences of the projection in numpy, the rounding's residual frozen; of the weights and of c."""
    rng = np.random.default_rng(bits)
    w, dy = rng.normal(0.1, 0.3, (5, 4, 3)), rng.normal(size=(5, 4, 3))
    qp, c = 2 ** (bits - 1) - 1, 1.3
    quant = make("proxq", "weight", bits, c=c, learn_c=True).double()
    assert quant.c.requires_grad and not make("proxq", "weight", bits).c.requires_grad
    quant.c.data.fill_(c)  # 1.3 in double precision
    quant.calibrate(torch.tensor(w))
    alpha = c * w.std()

    def codes(w: np.ndarray, c: float) -> np.ndarray:
        return np.clip((w - w.mean()) / w.std() * qp / c, -qp, qp)

    residual = np.round(codes(w, c)) - codes(w, c)

    def smooth(w: np.ndarray, c: float) -> float:
        return (dy * (codes(w, c) + residual) * alpha / qp).sum()

    x = torch.tensor(w, requires_grad=True)
    y = quant(x)
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(y.detach(), np.round(codes(w, c)) * alpha / qp, rtol=1e-12)
    e, expected = 1e-6, np.empty_like(w)
    for place in np.ndindex(w.shape):
        shift = np.zeros_like(w)
        shift[place] = e
        expected[place] = (smooth(w + shift, c) - smooth(w - shift, c)) / (2 * e)
    np.testing.assert_allclose(x.grad, expected, atol=1e-7)
    np.testing.assert_allclose(quant.c.grad, (smooth(w, c + e) - smooth(w, c - e)) / (2 * e), rtol=1e-6)


def test_proxq_space_is_the_same_for_every_task():
    """Codes depend on (w - mean)/std alone; latent() undoes into_codes()."""
    w = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    quant = make("proxq", "weight", 4).double()
    quant.calibrate(w)
    assert torch.equal(quant.codes(w), quant.codes(5 * w - 3))
    torch.testing.assert_close(quant.latent(quant.into_codes(w), w), w)
    step = quant.step().clone()
    quant(5 * w)
    assert quant.step() == step  # alpha is set from data once


@pytest.mark.parametrize("bits", BITS)
def test_best_c(bits):
    """The default c has the least squared error for a Gaussian, by integration cell by cell."""
    levels = np.arange(-(2 ** (bits - 1) - 1), 2 ** (bits - 1))

    def error(c: float) -> float:
        values = levels * c / levels[-1]
        edges = np.concatenate([[-12], (values[1:] + values[:-1]) / 2, [12]])
        cells = zip(values, edges[:-1], edges[1:], strict=True)
        return sum(quad(lambda x, v=v: (x - v) ** 2 * norm.pdf(x), low, high)[0] for v, low, high in cells)

    if bits < 8:  # at 8 bits the search takes long: a comparison with its neighbours does
        best = minimize_scalar(error, bounds=(1, 4.5), method="bounded", options={"xatol": 1e-3})
        assert best.x == pytest.approx(BEST_C[bits], abs=0.03)
        assert error(BEST_C[bits]) <= 1.001 * best.fun
    else:
        assert error(BEST_C[bits]) < min(error(BEST_C[bits] - 0.1), error(BEST_C[bits] + 0.1))
    stated = {2: (0.191, 0.649), 3: (0.047, 0.084), 4: (0.0129, 0.0157)}
    if bits in stated:
        assert (error(BEST_C[bits]), error(3)) == pytest.approx(stated[bits], rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole(name):
    """torch.compile takes model, losses and penalty in one graph; values and gradients are those of eager mode."""
    torch.manual_seed(0)
    family = registry.quantizer(name)
    model = SmallNet(Scheme(family, family, 4, 4))
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))
    calibrate(model, x)
    counts = torch.tensor([3.0, 1, 9, 4, 2])
    guard = PENALTIES["proxq"](SimpleNamespace(ll_lambda=1.0))
    convolutions = {k: v for k, v in quantized_weights(model).items() if v.dim() == 4}
    importance = {k: torch.rand_like(v) for k, v in convolutions.items()}
    anchor = {k: v + 0.1 * torch.randn_like(v) for k, v in convolutions.items()}
    guard.load_state_dict({"importance": importance, "anchor": anchor, "anchor_bytes": 0})

    def losses(x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        return torch.stack([*(loss(logits, y, counts) for loss in LOSSES.values()), guard.penalty(model)])

    def run(function) -> list[Tensor]:
        model.zero_grad()
        values = function(x, y)
        values.sum().backward()
        return [values.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    eager = run(losses)
    assert (eager[0] > 0).all()
    torch.testing.assert_close(run(torch.compile(losses, fullgraph=True, backend="aot_eager")), eager)
