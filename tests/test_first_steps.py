"""The first scales that quantizers find in data: by the papers' formulas, or with the least error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_quantizers import BITS, NAMES, bell, make

from lifequant import registry
from lifequant.quantizers.inputs import LSQInput


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_first_steps(bits):
    """METHODS' table: the initial steps of lsqplus's weights, llsq, pact and apot."""
    w, a = bell(4, 50) + 0.2, bell(4, 500, seed=1).relu()
    first = {}
    for name in ("lsqplus", "llsq", "apot"):
        first[name] = make(name, "weight", bits)
        first[name].calibrate(w)
    mean, std = w.numpy().mean(), w.numpy().std()
    widest = max(abs(mean - 3 * std), abs(mean + 3 * std))
    codes = 2 ** (bits - 1)
    assert first["lsqplus"].step().item() * codes == pytest.approx(
        max(widest, w.abs().max().item()) if bits == 8 else widest, rel=1e-5
    )
    assert first["llsq"].step().item() == pytest.approx(w.abs().max().item() / 2 ** (bits - 1), rel=1e-6)
    furthest = ((w - w.mean()) / w.std(correction=0)).abs().max().item()
    assert first["apot"].alpha.item() == pytest.approx(max(furthest, 3) if bits == 8 else 3)
    each = registry.quantizer("llsq").weight(bits, channels=4)
    each.calibrate(w)
    torch.testing.assert_close(each.step(), w.abs().amax(1) / (2 ** (bits - 1) - 1))
    act = {name: make(name, "activation", bits) for name in ("llsq", "pact", "apot")}
    for quant in act.values():
        quant.calibrate(a)
    parts = 2**bits if bits >= 4 else 2 * (2**bits - 1)
    assert act["llsq"].step().item() == pytest.approx(a.max().item() / parts, rel=1e-6)
    quantile = np.quantile(a[a > 0].numpy(), 0.999)
    assert act["pact"].alpha.item() == pytest.approx(quantile, rel=1e-5)
    assert act["apot"].alpha.item() == pytest.approx(quantile, rel=1e-5)
    assert {
        name: (make(name, "activation", 4).weight_decay, make(name, "weight", 4).weight_decay) for name in NAMES
    } == {name: (name == "pact", False) for name in NAMES}


@pytest.mark.parametrize("bits", BITS)
def test_lsq_step_of_weights(bits):
    """The lesser of 2 mean|v| / sqrt(qp), which binds at 2 bits, and of max|v| / qp, which binds at 8: nothing is
    clipped there, and the largest value has the largest code."""
    v = np.random.default_rng(bits).normal(size=(50, 20))
    qp = 2 ** (bits - 1) - 1
    mean, cap = 2 * np.abs(v).mean() / np.sqrt(qp), np.abs(v).max() / qp
    quant = make("lsq", "weight", bits).double()
    quant.calibrate(torch.tensor(v))
    assert quant.scale().item() == pytest.approx(min(mean, cap), rel=1e-12)
    if bits == 2:
        assert mean < cap
    if bits == 8:
        assert cap < 0.5 * mean
        assert quant.codes(torch.tensor(v)).abs().max() == qp


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.05])
@pytest.mark.parametrize("bits", BITS)
def test_lsq_step_of_activations(bits, share, signed):
    """A squared error near that of the best of 2,000 steps, however many values are zero."""
    rng = np.random.default_rng(bits)
    v = rng.laplace(size=8000) * (rng.random(8000) < share)
    v = v if signed else np.abs(v)
    quant = (LSQInput(bits) if signed else make("lsq", "activation", bits)).double()
    quant.calibrate(torch.tensor(v).view(80, 100))

    def error(step: float) -> float:
        return ((np.clip(np.round(v / step), quant.qn, quant.qp) * step - v) ** 2).sum()

    best = min(error(step) for step in np.geomspace(1e-3, 1, 2000) * np.abs(v).max())
    assert error(quant.scale().item()) < 1.1 * best
    if bits == 4 and share == 0.05:  # the paper's step, for comparison
        assert error(2 * np.abs(v).mean() / np.sqrt(quant.qp)) > 40 * best


@pytest.mark.parametrize("channels", [None, 4])
@pytest.mark.parametrize("name", ["lsqplus", "apot"])
def test_weights_with_heavy_tails(name, channels):
    """At 8 bits three standard deviations clip too much of them: the error is less than half of that."""
    w = torch.from_numpy(np.random.default_rng(0).standard_t(3, size=(4, 2000)) * 0.1)
    quant = registry.quantizer(name).weight(8, channels).double()
    quant.calibrate(w)
    clipped = w.clamp(w.mean() - 3 * w.std(), w.mean() + 3 * w.std())
    values = quant(w) * (w.std() if name == "apot" else 1)
    assert (values - w).norm() < (clipped - w).norm() / 2
