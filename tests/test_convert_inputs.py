"""Layer inputs that no ReLU gives: which of them quantize_model quantizes, how, and that a layer then takes few values."""

from __future__ import annotations

import copy
import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lifequant import calibrate, quantize_model, registry
from lifequant.qat.attention import QuantMultiheadAttention
from lifequant.qat.layers import fake_quants
from lifequant.qat.shifted_windows import ShiftedWindowAttention, ShiftedWindowAttentionV2, convert_
from lifequant.quantizers.inputs import LLSQInput, LSQInput, input_quantizer
from lifequant.quantizers.lsq import LSQActivation
from lifequant.quantizers.lsqplus import LSQPlusActivation

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Values(TorchFunctionMode):
    """Counts the distinct values of what convolutions and matrix products with weights take."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.conv2d, F.conv_transpose2d, F.linear):
            self.counts.append(len(args[0].unique()))
        assert function is not F.multi_head_attention_forward
        return function(*args, **(kwargs or {}))


def counts(q: nn.Module, *given: Tensor) -> list[int]:
    with Values() as values, torch.no_grad():
        copy.deepcopy(q)(*given)
    return values.counts


def quantized(model: nn.Module, x: Tensor = X, **options) -> nn.Module:
    q = quantize_model(model, **{"quantizer": "lsq", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(q, x)
    return q


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
    quant.calibrate(torch.tensor([[-3.0, 1.0]]))
    assert quant.step_size.item() == pytest.approx(min(2 * 2 / 7**0.5, 3 / 7))


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
    with pytest.warns(UserWarning, match="10 of 14 layers have an input that no quantizer gave: image, "):
        calibrate(q, X)
    expected = SIGNED - {"up"} | UNSIGNED - {"both"} | {"image", "image2"}
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


# Attention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("kdim", "biases"), [(None, True), (6, False)])
def test_attention_without_quantizers_is_torchs(batch_first, kdim, biases):
    torch.manual_seed(0)
    made = {"batch_first": batch_first, "kdim": kdim, "vdim": kdim}
    model = nn.MultiheadAttention(8, 2, bias=biases, add_bias_kv=biases, add_zero_attn=not biases, **made)
    q = copy.deepcopy(model)
    QuantMultiheadAttention.convert_(q, lambda cout: nn.Identity())
    long, short, size = 5, 4, 3
    for batched in (True, False):
        x, k, v = (
            torch.randn((n, e) if not batched else (size, n, e) if batch_first else (n, size, e))
            for n, e in ((short, 8), (long, kdim or 8), (long, kdim or 8))
        )
        masks = [None, torch.randn(short, long), torch.randn(2 * (size if batched else 1), short, long) > 1]
        paddings = [None, torch.arange(long).expand(*([size] if batched else []), long) > 3]
        for mask, padding, each in itertools.product(masks, paddings, (True, False)):
            given = {"attn_mask": mask, "key_padding_mask": padding, "average_attn_weights": each}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of masks of two kinds
                expected, weights = model(x, k, v, **given)
            found = q(x, k, v, **given)
            torch.testing.assert_close(found, (expected, weights))
            torch.testing.assert_close(q(x, k, v, need_weights=False, **given), (found[0], None))
    with pytest.raises(RuntimeError, match="attn_mask"):
        q(x, k, v, is_causal=True)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.self_attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x, memory = self.a(x), self.b(x)
        x = x + self.self_attention(x, x, x, need_weights=False)[0]
        return x + self.cross(x, memory, memory)[0]


def test_attention_is_quantized():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    q = quantized(Attends(), x, weight_bits=3)
    for mode in (True, False):
        found = counts(q.train(mode), x)
        assert len(found) == 10 and max(found[2:]) <= 16
    assert all(len(quant(w).unique()) <= 8 for m in (q.cross, q.self_attention) for quant, w in m.projections())
    assert q.cross.key_quant is q.cross.value_quant is not q.cross.act_quant
    assert q.quantization.images == ["a", "b"] and q.quantization.swapped["cross"].startswith(
        "MultiheadAttention, 3-bit"
    )
    q(x).sum().backward()
    assert all(p.grad is not None for p in q.parameters())
    model = Attends()
    assert (quantized(model, x, weight_bits=8, act_bits=8)(x) - model(x)).square().mean() < 1e-3


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU()])
def test_transformers_in_eval_mode(activation):
    """torch's fast paths use float weights; one of them makes a nested tensor of a padded batch."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation)
    model = nn.Sequential(nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2)).eval()
    x = torch.randint(20, (4, 5))
    q = quantized(model, x)
    found = counts(q, x)
    assert len(found) == 2 * 6 and max(found) <= 16 and not q.quantization.float_inputs
    padding = torch.arange(5) > torch.tensor([4, 2, 3, 4])[:, None]
    with torch.no_grad():
        assert q[1](q[0](x), src_key_padding_mask=padding)[~padding].isfinite().all()


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
def test_shifted_windows_without_quantizers_are_torchvisions(kind):
    torch.manual_seed(0)
    for size, shift in itertools.product(((4, 4), (7, 9), (3, 5), (8, 3)), ([0, 0], [2, 2], [1, 2], [0, 2])):
        model = kind(8, [4, 4], shift, 2)
        nn.init.normal_(model.qkv.bias)
        q = copy.deepcopy(model)
        convert_(q)
        x = torch.randn(2, *size, 8)
        torch.testing.assert_close(q(x), model(x), rtol=1e-4, atol=1e-5)


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
