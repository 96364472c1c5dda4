"""Values and gradients of every quantizer, in float64, against formulas written out here in numpy.

What is smooth (tanh, the normal distribution function, mean and deviation) is differentiated by central differences with
the rounding's residual frozen, which is what "straight through" means; what is simulated or defined is the definition.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from lifequant import registry

KINDS = ("weight", "activation")
Array = np.ndarray
Reference = Callable[[nn.Module, Array, Array], tuple[Array, Array, dict[str, float]]]


def levels_of(quant: nn.Module, kind: str) -> tuple[int, int]:
    return (-(2 ** (quant.bits - 1)), 2 ** (quant.bits - 1) - 1) if kind == "weight" else (0, 2**quant.bits - 1)


class LSQPaper(torch.autograd.Function):
    """Esser et al. 2020, eq. 1 to 3, and the gradient's scale of sec. 2.2."""

    @staticmethod
    def forward(ctx, v, s, low, high, g):
        ctx.save_for_backward(v, s)
        ctx.rest = low, high, g
        return (v / s).clamp(low, high).round() * s

    @staticmethod
    def backward(ctx, dy):
        v, s = ctx.saved_tensors
        low, high, g = ctx.rest
        u = v / s
        below, above = u <= low, u >= high
        ds = torch.where(below, low, torch.where(above, high, u.round() - u))
        return dy * ~(below | above), g * (dy * ds).sum(), None, None, None


def lsq(kind: str) -> Reference:
    def reference(quant, x, dy):
        low, high = levels_of(quant, kind)
        features = x.size if kind == "weight" else x[0].size  # of one image
        v, s = (
            torch.tensor(x, requires_grad=True),
            torch.tensor(quant.step_size.item(), dtype=torch.float64).requires_grad_(),
        )
        y = LSQPaper.apply(v, s, low, high, 1 / np.sqrt(features * high))
        y.backward(torch.tensor(dy))
        return y.detach().numpy(), v.grad.numpy(), {"step_size": s.grad.item()}

    return reference


def lsqplus_activation(quant, x, dy):
    s, b, (_, high) = quant.step_size.item(), quant.offset.item(), levels_of(quant, "activation")
    g, u = 1 / np.sqrt(x[0].size * high), (x - b) / s
    q, inside = np.round(np.clip(u, 0, high)), (u > 0) & (u < high)
    ds = np.where(inside, q - u, q)
    return s * q + b, dy * inside, {"step_size": g * (dy * ds).sum(), "offset": g * (dy * ~inside).sum()}


def llsq(kind: str) -> Reference:
    def reference(quant, x, dy):
        a, (low, high) = quant.step_size.item(), levels_of(quant, kind)
        values = {f: f * a * np.clip(np.round(x / (f * a)), low, high) for f in (0.5, 1, 2)}
        errors = {f: ((x - v) ** 2).sum() for f, v in values.items()}
        gradient = {0.5: a**2, 1: 0.0, 2: -(a**2)}[min(errors, key=errors.get)]
        inside = (x / a > low) & (x / a < high)
        return values[1], dy if kind == "weight" else dy * inside, {"step_size": gradient}

    return reference


def pact_activation(quant, x, dy):
    a, n = quant.alpha.item(), 2**quant.bits - 1
    y = np.round(np.clip(x, 0, a) / a * n) / n * a
    return y, dy * ((x > 0) & (x < a)), {"alpha": dy[x >= a].sum()}


APOT = {  # by the bits of a magnitude: exponents of the terms, each of which is 0 or a power of 1/2
    1: [[0]],
    2: [[1, 2, 3]],
    3: [[1, 2, 4], [3]],
    4: [[1, 3, 5], [2, 4, 6]],
    5: [[1, 3, 6], [2, 4, 7], [5]],
    7: [[1, 4, 8], [2, 5, 9], [3, 6, 10], [7]],
    8: [[1, 5, 9], [2, 6, 10], [3, 7, 11], [4, 8, 12]],
}


def magnitudes(bits: int) -> Array:
    sums = np.zeros(1)
    for exponents in APOT[bits]:
        sums = np.add.outer(sums, [0, *(0.5**e for e in exponents)]).ravel()
    return np.sort(sums) / sums.max()


def apot(kind: str) -> Reference:
    def reference(quant, x, dy):
        a = quant.alpha.item()
        mean, std = (x.mean(), x.std()) if kind == "weight" else (0, 1)
        levels = magnitudes(quant.bits - (kind == "weight"))
        levels = np.unique(np.concatenate([-levels, levels])) if kind == "weight" else levels
        t = (x - mean) / std / a
        q = levels[np.abs(t[..., None] - levels).argmin(-1)]
        inside = np.abs(t) < 1
        da = (dy * np.where(inside, q - t, np.sign(t))).sum()
        return a * q, dy / std if kind == "weight" else dy * inside, {"alpha": da}

    return reference


def through(codes: Callable, values: Callable, **bounds: Callable) -> Reference:
    """Straight through the rounding of ``codes(quant, x, **parameters)``, by central differences of all else.

    ``bounds``: a getter of each learned parameter.
    """

    def reference(quant, x, dy):
        start = {name: get(quant) for name, get in bounds.items()}
        u = codes(quant, x, **start)
        residual = np.round(u) - u

        def smooth(x: Array, **parameters: float) -> float:
            return (dy * values(quant, codes(quant, x, **parameters) + residual)).sum()

        e, dx = 1e-6, np.empty_like(x)
        for place in np.ndindex(x.shape):
            shift = np.zeros_like(x)
            shift[place] = e
            dx[place] = (smooth(x + shift, **start) - smooth(x - shift, **start)) / (2 * e)
        gradients = {}
        for name, value in start.items():
            above, below = (smooth(x, **start | {name: value + step}) for step in (e, -e))
            gradients[name] = (above - below) / (2 * e)
        return values(quant, np.round(u)), dx, gradients

    return reference


def proxq_codes(quant, w, c):
    qp = 2 ** (quant.bits - 1) - 1
    return np.clip((w - w.mean()) / w.std() * qp / c, -qp, qp)


def n(quant) -> int:
    return 2**quant.bits - 1


proxq = through(
    proxq_codes, lambda quant, u: u * quant.alpha.item() / (2 ** (quant.bits - 1) - 1), c=lambda q: q.c.item()
)
dorefa = through(
    lambda quant, w: n(quant) * (np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 1 / 2),
    lambda quant, u: 2 * u / n(quant) - 1,
)
dorefa_activation = through(lambda quant, x: n(quant) * np.clip(x, 0, 1), lambda quant, u: u / n(quant))
alignq = through(lambda quant, w: n(quant) * norm.cdf((w - w.mean()) / w.std()), lambda quant, u: 2 * u / n(quant) - 1)
alignq_activation = through(lambda quant, x: n(quant) * norm.cdf(x), lambda quant, u: 2 * (2 * u / n(quant) - 1))
uniform = through(lambda quant, w: n(quant) * (w - w.mean()) / w.std() / 2, lambda quant, u: u / n(quant))

REFERENCES: dict[str, tuple[Reference, Reference]] = {
    "lsq": (lsq("weight"), lsq("activation")),
    "lsqplus": (lsq("weight"), lsqplus_activation),
    "llsq": (llsq("weight"), llsq("activation")),
    "pact": (dorefa, pact_activation),
    "dorefa": (dorefa, dorefa_activation),
    "apot": (apot("weight"), apot("activation")),
    "alignq": (alignq, alignq_activation),
    "uniform": (uniform, lsq("activation")),
    "proxq": (proxq, lsq("activation")),
}
LEARNED = {"proxq": {"learn_c": True}}


def inputs(quant: nn.Module, kind: str, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(0.1, 0.8, (4, 5, 3)), rng.normal(size=(4, 5, 3))
    return (np.abs(x) if kind == "activation" and not quant.before_relu else x), dy


def compare(quant: nn.Module, kind: str, name: str, x: Array, dy: Array) -> dict[str, float]:
    reference = REFERENCES[name][KINDS.index(kind)]
    y, dx, gradients = reference(quant, x, dy)
    v = torch.tensor(x, requires_grad=True)
    out = quant(v)
    out.backward(torch.tensor(dy))
    np.testing.assert_allclose(out.detach(), y, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(v.grad, dx, rtol=1e-6, atol=1e-7)
    learned = {key: p.grad.item() for key, p in quant.named_parameters() if p.requires_grad}
    assert set(learned) == set(gradients)
    for key, value in gradients.items():
        np.testing.assert_allclose(learned[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    return gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", (2, 4, 5, 8))
@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_gradient(name, bits, kind):
    """Output, input's gradient and parameters' gradients, with values inside and values that are clipped."""
    if name not in REFERENCES:
        pytest.fail(f"write the gradients of {name!r} down in REFERENCES of {__file__}")
    quant = getattr(registry.quantizer(name, **LEARNED.get(name, {})), kind)(bits).double()
    x, dy = inputs(quant, kind, bits)
    quant.calibrate(torch.tensor(x))
    with torch.no_grad():
        for p in quant.parameters():  # narrower, so that some values are clipped
            p.mul_(0.4)
        if hasattr(quant, "offset"):
            quant.offset.add_(0.05)
    if list(quant.parameters()):
        clipped = np.isin(quant.codes(torch.tensor(x)), (quant.qn, quant.qp))
        assert 0 < clipped.sum() < clipped.size
    compare(quant, kind, name, x, dy)


@pytest.mark.parametrize("kind", KINDS)
def test_llsq_descends_to_the_better_step(kind):
    """Too wide a step has the gradient +a^2, too narrow a one -a^2, whatever comes from above; between them none."""
    for factor, sign in ((4, 1), (1, 0), (1 / 4, -1)):
        quant = getattr(registry.quantizer("llsq"), kind)(4).double()
        x, dy = inputs(quant, kind, 0)
        a = factor * (0.25 if kind == "weight" else 0.14)
        with torch.no_grad():
            quant.step_size.fill_(a)
        for upstream in (dy, -7 * dy):
            quant.zero_grad()
            assert compare(quant, kind, "llsq", x, upstream)["step_size"] == pytest.approx(sign * a**2, rel=1e-12)
