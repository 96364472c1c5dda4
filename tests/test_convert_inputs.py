"""Layer inputs that no ReLU gives: which of them quantize_model quantizes, how, and that a layer then takes few values."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.converted import X, counts, quantized
from torch import Tensor, nn

from lifequant import calibrate, quantize_model, registry
from lifequant.qat.layers import fake_quants
from lifequant.quantizers.inputs import LLSQInput, LSQInput, input_quantizer
from lifequant.quantizers.lsq import LSQActivation
from lifequant.quantizers.lsqplus import LSQPlusActivation

# Quantizers


@pytest.mark.parametrize("name", registry.names("quantizer"))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_signed_quantizer_of_every_family(name, bits):
    """At most 2^bits values of either sign, in any unit; a gradient for whatever is learned."""
    torch.manual_seed(0)
    for unit in (1e-3, 1.0, 1e3):
        x = (unit * torch.randn(16, 100)).requires_grad_()
        quant = input_quantizer(registry.quantizer(name), bits, signed=True)
        quant.calibrate(x.detach())
        out = quant(x)
        assert 2 ** (bits - 1) < len(out.unique()) <= 2**bits and out.min() < 0 < out.max()
        assert (out - x).square().mean() < {2: 0.4, 4: 0.04, 8: 0.002}[bits] * unit**2
        out.square().sum().backward()
        assert x.grad.any() and all(p.grad.isfinite().all() for p in quant.parameters())
        if name not in ("llsq", "lsqplus"):  # a step may be at rest; an offset is where nothing is clipped
            assert all(p.grad.any() for p in quant.parameters())


def test_whose_form_it_is():
    for name in registry.names("quantizer"):
        family = registry.quantizer(name)
        own = {"llsq": LLSQInput, "lsqplus": LSQPlusActivation}
        assert type(input_quantizer(family, 4, signed=True)) is own.get(name, LSQInput)
        without = {"alignq": LSQActivation, "dorefa": LSQActivation}
        assert type(input_quantizer(family, 4, signed=False)) is without.get(name, family.act_type)
        assert type(input_quantizer(family, 32, signed=True)) is nn.Identity
    quant = LSQInput(4)
    assert (quant.qn, quant.qp) == (-8, 7) and quant(torch.zeros(0, 3)).shape == (0, 3)
    quant.calibrate(torch.tensor([[-8.0, 1.0]]))
    assert quant.step_size.item() == pytest.approx(1)


# Which inputs


class Places(nn.Module):
    """Each layer takes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.image2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        for name in (
            "linear", "one", "two", "pooled", "summed", "both", "leaky", "norm", "gate", "padded", "function",
        ):  # fmt: skip
            setattr(self, name, nn.Conv2d(4, 4, 1))
        self.up, self.relu, self.relu2, self.act = nn.ConvTranspose2d(4, 4, 2), nn.ReLU(), nn.ReLU6(), nn.LeakyReLU()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.relu(self.image(x)), self.relu2(self.image2(x))
        a = self.one(a) + self.two(F.max_pool2d(a, 3, 1, 1))  # given
        a = self.linear(a)  # a sum with a sign
        c = self.relu(a)
        c = self.pooled(F.avg_pool2d(c, 3, 1, 1)) + self.padded(F.pad(c, (1, 1, 1, 1)))[:, :, 1:-1, 1:-1]
        c = self.summed(b + self.relu(c)) + self.both(torch.cat([b[:, :2], self.relu(c)[:, 2:]], 1))
        c = self.leaky(self.act(c)) + self.gate(c.sigmoid() * b) + self.function(c.relu())
        c = self.up(self.norm(F.layer_norm(c, c.shape[1:])))
        return self.fc(c.mean((2, 3)))


SIGNED = {"linear", "leaky", "norm", "up", "fc"}
UNSIGNED = {"pooled", "summed", "both", "gate", "function"}


def test_which_inputs_are_quantized():
    """All but the image and what a single ReLU's quantizer gives; without a sign where nothing can be negative."""
    torch.manual_seed(0)
    q = quantized(Places())
    report = q.quantization
    expected = dict.fromkeys(SIGNED, "4-bit signed input (LSQInput)")
    assert report.inputs == expected | dict.fromkeys(UNSIGNED, "4-bit input (LSQActivation)")
    assert report.images == report.float_inputs == ["image", "image2"]
    assert "2  float input, the model's own: image, image2" in str(report)
    found = counts(q, X)
    assert len(found) == 15 and found[:2] == [X.numel()] * 2 and max(found[2:]) <= 16


def test_as_before():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="ReLU is called as a function"):
        q = quantize_model(Places(), "lsq", inputs="relu")
    with pytest.warns(UserWarning, match="11 of 15 layers have an input that no quantizer gave: image, "):
        calibrate(q, X)
    expected = SIGNED | UNSIGNED - {"both"} | {"image", "image2"}
    assert set(q.quantization.float_inputs) == expected and not q.quantization.inputs


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v, self.other = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        return self.other((self.q(x) @ self.k(x).transpose(-2, -1)).softmax(-1) @ self.v(x))


def test_one_quantizer_of_a_shared_tensor():
    x = torch.randn(4, 5, 8)
    q = quantized(Shared(), x)
    assert q.q.act_quant is q.k.act_quant is q.v.act_quant is not q.other.act_quant
    assert "3  4-bit signed input (LSQInput), shared: q, k, v" in str(q.quantization)
    twin = copy.deepcopy(q)
    assert twin.q.act_quant is twin.v.act_quant is not q.q.act_quant
    q = quantized(Shared(), x, layer_bits={"k": (4, 8)})
    assert q.q.act_quant is q.v.act_quant is not q.k.act_quant and (q.q.act_quant.bits, q.k.act_quant.bits) == (4, 8)
    with pytest.warns(UserWarning, match="1 of 5 layers have an input that no quantizer gave: k"):
        calibrate(quantize_model(Shared(), layer_bits={"k": (4, 32)}), x)


def test_layer_bits():
    """A layer's bits are those of its input; behind a ReLU without a quantizer it has one of its own."""
    q = quantized(Places(), layer_bits={"up": 8, "leaky": (3, 2), "relu2": 32})
    assert (q.up.act_quant.bits, q.leaky.act_quant.bits, q.leaky.weight_quant.bits) == (8, 2, 3)
    relu = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert quantized(relu).quantization.inputs == {}
    assert quantized(relu, layer_bits={"1": 32}).quantization.inputs == {"2": "4-bit input (LSQActivation)"}


class Untraceable(Places):
    """As Places, with a second use of a layer: once on what a quantizer gave, once on something else."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return self.never(x)
        y = super().forward(x)
        return y + self.one(self.relu(x[:, [0, 1, 2, 0]])).mean() + self.two(F.silu(x[:, [0, 1, 2, 0]])).mean()


def test_a_model_that_cannot_be_traced():
    """Calibration decides, and a copy of parameters and buffers has the decision too, as has a state dict."""
    torch.manual_seed(0)
    q = quantize_model(Untraceable(), "lsq")
    assert "12" in str(q.quantization) and "if calibration finds that it needs one" in str(q.quantization)
    early, initial = copy.deepcopy(q), copy.deepcopy(q)
    with pytest.warns(UserWarning, match="1 layers were not reached: never"):
        calibrate(q, X)
    report = q.quantization
    assert set(report.inputs) == SIGNED | UNSIGNED | {"two"} and report.images == report.float_inputs == [
        "image",
        "image2",
    ]
    found = counts(q, X)
    assert found[:2] == [X.numel()] * 2 and max(found[2:]) <= 16 and not report.inputs.keys() & {"one", "padded"}
    with torch.no_grad():
        for target in (early.parameters, early.buffers):
            for mine, others in zip(target(), getattr(q, target.__name__)(), strict=True):
                mine.copy_(others)
    initial.load_state_dict(q.state_dict())
    for other in (early, initial, copy.deepcopy(q)):
        other._forward_pre_hooks.clear()
        assert torch.equal(other.eval()(X), q.eval()(X))
    q.train()(X).sum().backward()
    assert all(p.grad.isfinite().all() for n, p in q.named_parameters() if p.grad is not None)


def test_state_dicts():
    """A float model's loads strictly; a quantized model's into a fresh one gives the same network."""
    torch.manual_seed(0)
    model = Places()
    q = quantized(model)
    fresh = quantize_model(Places(), "lsq")
    fresh.load_state_dict(q.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fresh.eval()(X), q.eval()(X))
    for other in (quantize_model(Places(), "lsq"), quantize_model(Untraceable(), "lsq")):
        state = {**other.state_dict(), **model.state_dict()}
        state = {name: value for name, value in state.items() if "_quant" not in name}
        other.load_state_dict(state)
        with pytest.warns(UserWarning, match="were not set"):
            other(X)


def test_the_projects_own_network_has_none():
    family = registry.quantizer("lsq")
    from lifequant.qat.layers import Scheme

    model = registry.model("resnet20")(10, Scheme(family, family))
    names = {name for name, _ in fake_quants(model) if name.endswith("act_quant")}
    assert len(names) == 20 and not any("conv" in name for name in names)


# torchvision's models


SMALL = {
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
    "swin": partial(torchvision.models.SwinTransformer, [4, 4], 16, [2], [2], [4, 4]),
    "vit": partial(torchvision.models.VisionTransformer, 32, 8, 2, 2, 16, 32),
}


@pytest.mark.parametrize("name", SMALL)
def test_torchvision(name):
    """Few values everywhere but of the image, in both modes; the float state loads; it trains; it compiles whole."""
    torch.manual_seed(0)
    model = SMALL[name](num_classes=4)
    for p in model.parameters():  # untrained biases are zero, as is a head, and so would be much of what is counted
        if p.dim() == 1 or not p.any():
            nn.init.normal_(p, p.detach().mean().item(), 0.1)
    x = torch.randn(4, 3, 32, 32)
    q = quantized(model, x)
    for mode in (True, False):
        found = counts(q.train(mode), x)
        assert found[0] > 16 >= max(found[1:]) and len(q.quantization.float_inputs) == 1
    if name in ("swin", "vit"):  # to compile one of the others takes long
        with torch.no_grad():
            torch.compiler.reset()
            torch.testing.assert_close(torch.compile(q, fullgraph=True, backend="eager")(x), q(x))
    optimizer = torch.optim.SGD(q.train().parameters(), 1e-3)
    for _ in range(3):
        loss = F.cross_entropy(q(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    q.load_state_dict(model.state_dict())
