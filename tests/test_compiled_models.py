"""Models that torch.compile made, or parts of them: calibration runs eagerly, since compiled code looks for no new hooks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lifequant import calibrate, quantize_model
from lifequant.qat.code_usage import code_counts
from lifequant.qat.layers import fake_quants

X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network() -> nn.Module:
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), part, nn.Flatten(), nn.Linear(144, 5))
    return quantize_model(model).eval()


def scales(q: nn.Module) -> list[float]:
    return [quant.scale().item() for _, quant in fake_quants(q)]


def compiled(q: nn.Module, way: str) -> nn.Module:
    if way == "whole":
        return torch.compile(q, backend="eager", fullgraph=True)
    if way == "in place":
        q.compile(backend="eager", fullgraph=True)
    else:
        q[3] = torch.compile(q[3], backend="eager", fullgraph=True)
    return q


@pytest.mark.parametrize("way", ["whole", "in place", "part"])
def test_calibrated_once_more(way):
    """All scales are those of an eager model, whatever they were when the compiled one ran."""
    q, eager = network(), network()
    calibrate(q, X)
    calibrate(eager, 2 * X)
    other = compiled(q, way)
    with torch.no_grad():
        other(X)
        for _, quant in fake_quants(q):
            quant.step_size.mul_(3)
        calibrate(other, 2 * X)
        assert scales(q) == scales(eager) and not q.quantization.unreached
        assert q.quantization.images == ["0"] and len(q.quantization.errors) == len(scales(q))
        assert torch.equal(other(X), eager(X))
        counted = code_counts(q, X)
    assert len(counted) == len(scales(q)) and all(row.counts.sum() for row in counted.values())


def test_a_float_state_in_a_compiled_model():
    """The next pass sets the scales anew, and says so, although compiled code passes over hooks that came later."""
    q, eager, float_state = network(), network(), network().state_dict()
    calibrate(q, X)
    other = torch.compile(q, backend="eager")
    with torch.no_grad():
        other(X)
        state = {name: 3 * value for name, value in float_state.items() if "_quant" not in name}
        for model in (q, eager):
            model.load_state_dict(state)
        calibrate(eager, X)
        with pytest.warns(UserWarning, match="its first forward pass sets them now"):
            found = other(X)
    assert scales(q) == scales(eager) and torch.equal(found, eager(X))


def test_the_first_pass_of_a_compiled_model():
    q, eager = network(), network()
    calibrate(eager, X)
    other = torch.compile(q, backend="eager")
    with pytest.warns(UserWarning, match="its first forward pass sets them now"):
        other(X)
    assert scales(q) == scales(eager) and torch.equal(other(X), eager(X))
