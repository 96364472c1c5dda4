"""--importance_bits: bounds of the rounding, and what a method and a penalty keep."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.small_tasks import make_task, move, network, play

from lifequant import registry
from lifequant.methods.importance import protected
from lifequant.methods.rounding import rounded, rounded_flat


def test_rounding():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).double() ** 5  # over many magnitudes
    largest = values.abs().max().item()
    assert rounded(values, 32) is values
    half = rounded(values, 16)
    assert ((half - values).abs() <= (values.abs() * 2.0**-11).clamp(min=largest * 2.0**-25)).all()
    codes = rounded(values, 8)
    assert (codes - values).abs().max() <= largest / 254 * (1 + 1e-9) and len(codes.unique()) <= 255
    importances = values.abs()
    kept = rounded(importances, 8, unsigned=True)
    assert ((kept / largest).sqrt() - (importances / largest).sqrt()).abs().max() <= 0.5 / 255 * (1 + 1e-9)
    assert len(kept.unique()) <= 256 and kept.max() == pytest.approx(largest)
    assert (kept == 0).sum() < ((importances / largest * 255).round() == 0).sum()  # evenly spaced levels lose more
    for bits in (8, 16):
        assert (rounded(torch.zeros(3), bits) == 0).all() and (rounded(torch.zeros(3), bits, unsigned=True) == 0).all()
        both = rounded_flat(torch.tensor([1.0, 0.5, 1e-9, 2e-9]), [2, 2], bits, unsigned=True)
        assert both.tolist() == pytest.approx([1.0, 0.5, 1e-9, 2e-9], rel=0.01)  # a scale for each tensor


@pytest.mark.parametrize("name", ["ewc", "si", "rwalk"])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_method(name, bits):
    """Both vectors are those of 32 bits, each parameter rounded by itself; the bytes are the bits', and 4 for a scale."""
    (fine, _), (coarse, _) = play(name, network()), play(name, network(), importance_bits=bits)
    sizes = [p.numel() for p in protected(network()).values()]
    for vector, unsigned in (("importance", True), ("anchor", False)):
        exact = getattr(fine, vector).split(sizes)
        for part, kept in zip(exact, getattr(coarse, vector).split(sizes), strict=True):
            assert torch.equal(rounded(part, bits, unsigned), kept)
    assert not torch.equal(fine.importance, coarse.importance)
    number, before = sum(sizes), fine.memory_bytes()
    kept = number * bits // 8 + 4 * len(sizes)
    assert coarse.memory_bytes() == {"importance": before["importance"] - 8 * number + kept, "reference": kept}


def test_a_penalty():
    guards = {}
    for bits in (32, 8):
        model = network()
        guards[bits] = registry.penalty("proxq")(SimpleNamespace(ll_lambda=1.0, importance_bits=bits))
        guards[bits].begin_task(model, make_task(0))
        move(model)
        guards[bits].begin_task(model, make_task(1))
    for name, exact in guards[32].importance.items():
        assert exact.any() and torch.equal(guards[8].importance[name], rounded(exact, 8, unsigned=True))
    fine, coarse = (guards[bits].memory_bytes() for bits in (32, 8))
    assert fine["reference"] == coarse["reference"]
    assert coarse["importance"] == fine["importance"] // 4 + 4 * len(guards[8].importance)
