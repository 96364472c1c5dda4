"""Every registered quantizer: few codes, consistent codes, steps set in place, one step a channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from support.small_net import SmallNet
from torch import Tensor, nn

from lifequant import registry
from lifequant.common.errors import UserError
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.code_usage import code_counts
from lifequant.qat.layers import Scheme
from lifequant.quantizers.apot import powers_of_two
from lifequant.quantizers.proxq import BEST_C

NAMES = registry.names("quantizer")
BITS = (2, 3, 4, 5, 6, 8)
KINDS = ("weight", "activation")
# Quantizers whose step does not come from data; all others' grows with the data.
FIXED = {"weight": {"alignq", "apot", "dorefa", "pact", "uniform"}, "activation": {"alignq", "dorefa"}}


def make(name: str, kind: str, bits: int, **options) -> nn.Module:
    return getattr(registry.quantizer(name, **options), kind)(bits)


def bell(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def tensors(draw) -> Tensor:
    """Constant, bell-shaped or skewed, one element or many, from tiny to huge."""
    shape = draw(st.sampled_from([(1, 1), (3, 1), (2, 8), (4, 3, 3, 3)]))
    scale = draw(st.sampled_from([0.0, 1e-30, 1e-10, 0.05, 1.0, 40.0, 1e10, 1e30]))
    x = bell(*shape, seed=draw(st.integers(0, 99)))
    return scale * draw(st.sampled_from([x, x.exp() - 0.2, torch.full(shape, -0.7)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(seen=tensors(), other=tensors(), bits=st.sampled_from(BITS))
def test_codes(name, kind, seen, other, bits):
    """At most 2^b finite values, which the codes repeat, of the data that the step was set from and of other data."""
    quant = make(name, kind, bits)
    if kind == "activation" and not quant.before_relu:
        seen, other = seen.abs(), other.abs()
    quant.calibrate(seen)
    assert quant.scale().shape == () and quant.scale() > 0
    for x in (seen, other):
        x = x.clone().requires_grad_()
        values, codes = quant(x), quant.codes(x)
        assert values.shape == codes.shape == x.shape and not codes.is_floating_point()
        assert torch.isfinite(values).all()
        assert torch.equal(values, quant.dequantize(codes.to(x.dtype), x))
        if not quant.exceeds_bits:
            assert len(values.unique()) <= 2**bits and codes.dtype == torch.int16
            assert quant.qn <= codes.min() and codes.max() <= quant.qp and quant.qp - quant.qn < 2**bits
    if seen.abs().max() > 1e20:
        return  # the squares of such a loss are infinite
    quant(x := seen.clone().requires_grad_()).sum().backward()
    assert all(torch.isfinite(g).all() for g in [x.grad, *(p.grad for p in quant.parameters() if p.requires_grad)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_latent(name, kind):
    """latent() is the inverse of to_codes() in range; without rounding nothing but clamp and round is skipped."""
    for bits in (2, 4, 8):
        quant = make(name, kind, bits).double()
        x = bell(40, 5).double().clamp(-1.3, 1.3)
        x = x if kind == "weight" or quant.before_relu else x.abs()
        quant.calibrate(x)
        u = quant.to_codes(x)
        torch.testing.assert_close(quant.inverse(u, x), x, rtol=1e-6, atol=1e-9)
        quant.rounding = False
        torch.testing.assert_close(quant(x), quant.dequantize(u, x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_is_not_finite(name, kind):
    for bad in (float("nan"), float("inf")):
        quant = make(name, kind, 4)
        with pytest.raises(UserError, match=r"^\w+, 4 bits: 1 of the 6 values \(shape \[2, 3\]\).*NaN or infinite.*$"):
            quant.calibrate(torch.tensor([[0.1, 0.2, 0.3], [0.4, bad, 0.5]]))


def test_uniform_exceeds_its_bits():
    """As the published code: about 60 codes of a Gaussian tensor at "4 bits", 13 at "2"; marked, and counted in full."""
    marked = {name for name in NAMES if registry.quantizer_class(name).exceeds_bits}
    assert marked == {name for name in NAMES if make(name, "weight", 4).exceeds_bits} == {"uniform"}
    assert not any(make(name, "activation", 4).exceeds_bits for name in NAMES)
    for bits, codes in ((4, 60), (2, 13)):
        w = bell(10_000)
        quant = make("uniform", "weight", bits)
        assert len(quant(w).unique()) == pytest.approx(codes, abs=5 if bits == 4 else 0)
        z = (w - w.mean()) / w.std(correction=0)
        expected = (z / 2 * (2**bits - 1)).round() / (2**bits - 1)
        assert ((quant(w) - expected).abs() > 1e-6).float().mean() < 1e-4  # a value between two codes may go either way
    family = registry.quantizer("uniform")
    model = SmallNet(Scheme(family, family, 2, 2))
    model.conv2.weight.data.copy_(bell(6, 4, 3, 3))
    calibrate_network(model, x := bell(8, 3, 8, 8))
    quant, first, counts = code_counts(model, x)["conv2.weight_quant"]
    codes = quant.codes(model.conv2.weight)
    assert first == codes.min() < quant.qn and first + len(counts) - 1 == codes.max() > quant.qp
    assert counts.tolist() == [(codes == code).sum() for code in range(first, first + len(counts))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_codes_use_the_range(name, kind):
    """Of a bell-shaped tensor, most codes at 2 to 4 bits; a larger number never has a smaller code."""
    x = bell(20000, seed=1)
    for bits in (2, 3, 4):
        quant = make(name, kind, bits)
        x = (x.abs() if kind == "activation" and not quant.before_relu else x).flatten().sort().values.view(10, -1)
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
    step = quant.scale().clone()
    quant.calibrate(10 * x)
    assert {key: id(value) for key, value in quant.named_parameters()} == before
    grows = 1 if name in FIXED[kind] else 10
    assert quant.scale().item() == pytest.approx(grows * step.item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_a_channel(name):
    """A channel is quantized as a tensor of its own would be, and has the gradients of one."""
    w, dy = (bell(3, 2, 3, 3, seed=i).double() for i in (0, 1))
    w = w * torch.tensor([0.1, 1, 5]).view(3, 1, 1, 1)
    many = registry.quantizer(name).weight(3, channels=3).double()
    many.calibrate(w)
    assert many.step().shape == (3,) and (name in FIXED["weight"]) == (len(many.step().unique()) == 1)
    x = w.clone().requires_grad_()
    values = many(x)
    values.backward(dy)
    for i in range(3):
        one = registry.quantizer(name).weight(3).double()
        one.load_state_dict({key: value[i] for key, value in many.state_dict().items()})
        alone = w[i : i + 1].clone().requires_grad_()
        value = one(alone)
        value.backward(dy[i : i + 1])
        torch.testing.assert_close(values[i : i + 1], value)
        torch.testing.assert_close(x.grad[i : i + 1], alone.grad)
        assert torch.equal(many.codes(w)[i : i + 1], one.codes(w[i : i + 1]))
        torch.testing.assert_close(many.inverse(many.to_codes(w), w)[i], w[i], rtol=1e-5, atol=1e-7)
        for key, p in one.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(dict(many.named_parameters())[key].grad[i], p.grad)


@pytest.mark.parametrize("name", ("alignq", "apot", "proxq", "uniform"))
def test_standard_space_of_huge_weights(name):
    """Codes in units of the standard deviation are those of the weights in any unit; beyond what float32 can square,
    they still are finite."""
    w = bell(20, 50)
    small, huge = (make(name, "weight", 4) for _ in range(2))
    small.calibrate(w)
    huge.calibrate(2.0**90 * w)
    assert torch.equal(huge.codes(2.0**90 * w), small.codes(w))
    huge.calibrate(2.0**115 * w)
    assert torch.isfinite(huge(2.0**115 * w)).all()


@pytest.mark.parametrize("data", ("relu", "shifted", "skewed"))
@pytest.mark.parametrize("bits", (2, 4))
def test_lsqplus_offset(bits, data):
    """Step and offset of activations: no more than 2 % above the least squared error on a fine grid of both."""
    x = bell(4000, seed=2).double()
    x = {"relu": x.relu(), "shifted": x.abs() + 2, "skewed": x.exp() - 0.3}[data]
    quant = make("lsqplus", "activation", bits).double()
    quant.calibrate(x.view(4, -1))
    low, width, qp = x.min(), x.max() - x.min(), 2**bits - 1
    s, b = torch.meshgrid(
        torch.linspace(0.04, 1, 60) * width / qp, torch.linspace(0, 0.3, 30) * width + low, indexing="ij"
    )
    s, b = s.reshape(-1, 1).double(), b.reshape(-1, 1).double()
    least = (s * ((x - b) / s).round().clamp(0, qp) + b - x).square().mean(1).min()
    assert (quant(x) - x).square().mean() <= 1.02 * least
    if data == "shifted":
        assert quant.offset.item() == pytest.approx(2, abs=0.5)
    assert [id(p) for p in quant.scale_parameters()] == [id(quant.step_size)]


def test_powers_of_two():
    """At most 2^b levels, all different, the largest 1; every level is a sum of that many powers of two."""
    assert powers_of_two(1) == [0, 1] and powers_of_two(2) == [0, 1 / 4, 1 / 2, 1]
    assert [10 * level for level in powers_of_two(3)] == pytest.approx([0, 1, 2, 3, 4, 6, 8, 10])
    for bits in range(1, 9):
        levels = powers_of_two(bits)
        assert len(set(levels)) == 2**bits and levels == sorted(levels) and levels[-1] == 1
    for bits in BITS:
        w = make("apot", "weight", bits)
        assert w.qp == -w.qn == 2 ** (bits - 1) - 1
    quant = make("apot", "weight", 2)
    assert quant(bell(1000)).unique().tolist() == [-3, 0, 3]


def test_proxq_space_is_the_same_for_every_task():
    """Codes depend on (w - mean)/std alone; latent() undoes to_codes()."""
    w = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    quant = make("proxq", "weight", 4).double()
    quant.calibrate(w)
    assert torch.equal(quant.codes(w), quant.codes(5 * w - 3))
    torch.testing.assert_close(quant.inverse(quant.to_codes(w), w), w)
    step = quant.scale().clone()
    quant(5 * w)
    assert quant.scale() == step  # alpha is set from data once


@pytest.mark.parametrize("bits", BITS)
def test_best_c(bits):
    """The default c has the least squared error for a Gaussian, by integration."""
    qp = 2 ** (bits - 1) - 1
    x, dx = np.linspace(-12, 12, 200_001, retstep=True)

    def error(c: float) -> float:
        return ((x - np.clip(np.round(x * qp / c), -qp, qp) * c / qp) ** 2 * norm.pdf(x)).sum() * dx

    best = minimize_scalar(error, bounds=(1, 4.5), method="bounded", options={"xatol": 1e-3})
    assert best.x == pytest.approx(BEST_C[bits], abs=0.03)
    assert error(BEST_C[bits]) <= 1.001 * best.fun
    stated = {2: (0.191, 0.649), 3: (0.047, 0.084), 4: (0.0129, 0.0157)}
    if bits in stated:
        assert (error(BEST_C[bits]), error(3)) == pytest.approx(stated[bits], rel=0.02)
