"""Any torch model quantized: which layers, and that nothing else about it changes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.converted import Net, X, bits_of, net, types
from torch import Tensor, nn

from lifequant import calibrate, quantize_model, registry
from lifequant.common.errors import UserError
from lifequant.qat.layers import QuantConv2d, QuantLinear, QuantReLU, Scheme, set_layer_bits

EXAMPLES = Path(__file__).parent / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:calibrate. .* input that no quantizer gave")


def test_what_is_swapped():
    model, q = net()
    assert QuantConv2d not in types(model) and not hasattr(model, "quantization")
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(model.parameters(), q.parameters(), strict=False))
    assert isinstance(q.conv2, nn.Conv2d) and isinstance(q.fc, nn.Linear) and isinstance(q, Net)
    assert q.quantization.swapped == {
        "conv1": "Conv2d, 8-bit weights (LSQWeight)",
        "conv2": "Conv2d, 4-bit weights (LSQWeight)",
        "relu": "ReLU, 4-bit outputs (LSQActivation)",
        "relu6": "ReLU6, 4-bit outputs (LSQActivation)",
        "conv3": "Conv2d, 4-bit weights (LSQWeight)",
        "fc": "Linear, 8-bit weights (LSQWeight)",
    }
    assert q.quantization.left == {}
    assert q.quantization.inputs == {"fc": "4-bit input (LSQActivation)"} and q.quantization.images == ["conv1"]
    assert type(net(inputs="relu")[1].fc.act_quant) is nn.Identity


def test_what_is_left_alone(capsys):
    class Own(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {
            "own": Own(2, 2, 1),
            "tied": nn.Linear(4, 4),
            "tied2": nn.Linear(4, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "spectral": nn.utils.spectral_norm(nn.Conv2d(2, 2, 1)),
            "gelu": nn.GELU(),
            "conv1d": nn.Conv1d(2, 2, 1),
            "bn": nn.BatchNorm2d(3),
            "linear": nn.Linear(4, 4),
            "relu": nn.ReLU(),
        }
    )
    model["tied2"].weight = model["tied"].weight
    q = quantize_model(model, act_bits=32, verbose=True)
    assert list(q.quantization.swapped) == ["linear"]
    assert q.quantization.left == {
        "own": "Own, a subclass of Conv2d",
        "tied": "Linear that shares its weight with 'tied2'",
        "tied2": "Linear that shares its weight with 'tied'",
        "normed": "Linear whose weight is parametrized",
        "spectral": "Conv2d whose weight is parametrized",
        "gelu": "GELU, an activation",
        "conv1d": "Conv1d, its weight",
        "relu": "ReLU, 32 bits",
    }
    table = capsys.readouterr().out
    assert table == f"{q.quantization}\n" and "1  left: GELU, an activation" in table
    assert q["tied"].weight is q["tied2"].weight


@pytest.mark.parametrize(
    ("name", "convs", "linears", "relus", "left"),
    [
        ("resnet18", 20, 1, 9, 0),
        ("mobilenet_v2", 52, 1, 35, 0),
        ("squeezenet1_1", 26, 0, 26, 0),
        ("shufflenet_v2_x0_5", 56, 1, 37, 0),
        ("efficientnet_b0", 81, 1, 0, 65),
    ],
)
def test_torchvision(name, convs, linears, relus, left):
    with torch.device("meta"):
        q = quantize_model(torchvision.models.get_model(name, num_classes=10))
    found = types(q)
    assert [found.count(t) for t in (QuantConv2d, QuantLinear, QuantReLU)] == [convs, linears, relus]
    assert nn.Conv2d not in found and nn.Linear not in found and nn.ReLU not in found
    weights = [m.weight_quant.bits for m in q.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    assert weights[0] == weights[-1] == 8 and set(weights[1:-1]) == {4}
    assert len(q.quantization.left) == left and len(q.quantization.swapped) == convs + linears + relus


def test_user_errors():
    model, q = net()
    for wrong, words in {
        "already quantized": lambda: quantize_model(q),
        "that can be quantized": lambda: quantize_model(nn.Sequential(nn.GELU(), nn.BatchNorm2d(3))),
        "eager nn.Module": lambda: quantize_model(torch.jit.script(nn.Linear(2, 2))),
        "weight_bits: 7": lambda: quantize_model(model, weight_bits=7),
        "did you mean 'proxq'": lambda: quantize_model(model, "prox"),
        "did you mean 'conv1'": lambda: quantize_model(model, layer_bits={"convv1": 8}),
        "layer_bits, 'conv1': 9": lambda: quantize_model(model, layer_bits={"conv1": 9}),
        "inputs: 'none' is not": lambda: quantize_model(model, inputs="none"),
        "neither bits nor": lambda: quantize_model(model, layer_bits={"conv1": (1, 2, 3)}),
        "no batch": lambda: calibrate(q, []),
        "a tuple that begins with the input": lambda: calibrate(q, [3]),
        "NaN or infinite": lambda: calibrate(q, [X / 0]),
        "quantize_model made": lambda: calibrate(model, [X]),
    }.items():
        with pytest.raises(UserError, match=re.escape(wrong)):
            words()


# Bits


def test_first_and_last():
    assert bits_of(net(first_last_bits=None)[1]) == bits_of(net(keep_first_last=None)[1])  # the former name
    assert bits_of(net(first_last_bits=None)[1])["conv1.weight_quant"] == 4
    found = bits_of(net(weight_bits=2, act_bits=3, first_last_bits=6)[1])
    assert [found[f"{name}.weight_quant"] for name in ("conv1", "conv2", "conv3", "fc")] == [6, 2, 2, 6]
    assert found["relu.act_quant"] == found["relu6.act_quant"] == 3
    assert set(bits_of(net(weight_bits=32, act_bits=32)[1]).values()) == {32}


def test_layer_bits():
    found = bits_of(net(layer_bits={"conv?": 6, "relu6": (8, 5), "conv1": (3, 8), "fc": (2, 2)})[1])
    assert [found[f"{name}.weight_quant"] for name in ("conv1", "conv2", "conv3", "fc")] == [3, 6, 6, 2]
    assert found["relu.act_quant"] == 4 and found["relu6.act_quant"] == 5
    assert found["fc.act_quant"] == 2


@pytest.mark.parametrize("pattern", ["layer3", "layer3.*"])
def test_layer_bits_of_a_block_of_our_own_network(pattern):
    family = registry.quantizer("lsq")
    scheme = Scheme(family, family, weight_bits=32, act_bits=32, per_channel=True)
    model = registry.model("resnet20")(10, scheme)
    set_layer_bits(model, scheme, {pattern: (2, 4), "fc": 8})
    for name, bits in bits_of(model).items():
        inside = 4 if "act" in name else 2
        assert bits == (inside if name.startswith("layer3.") else 8 if name.startswith("fc.") else 32), name
    assert model.layer3[0].conv1.weight_quant.scale().shape == (64,)
    with pytest.raises(UserError, match=r"did you mean 'layer3\.0'"):
        set_layer_bits(model, scheme, {"layer3.00.*": 4})


# What is computed


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_32_bits_is_the_float_model(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).eval()
    q = quantize_model(model, weight_bits=32, act_bits=32)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(q(x), model(x))


def test_an_input_changed_in_place_stays_changed():
    class Preactivated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            return self.conv(self.relu(x)) + x

    model = Preactivated()
    q = quantize_model(model, weight_bits=32, act_bits=32)
    assert torch.equal(q(X), model(X))
    q = quantize_model(model)
    calibrate(q, X)
    q(X.clone().requires_grad_()).sum().backward()


def test_forward_against_functional_convolutions():
    _, q = net()
    calibrate(q, [X])
    q.eval()

    def weight(layer: nn.Module) -> Tensor:
        s, bits = layer.weight_quant.step_size, layer.weight_quant.bits
        return (layer.weight / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s

    def act(x: Tensor, relu: nn.Module) -> Tensor:
        return (x / relu.act_quant.step_size).round().clamp(0, 15) * relu.act_quant.step_size

    x = act(q.bn(F.conv2d(X, weight(q.conv1), q.conv1.bias, padding=1)).relu(), q.relu)
    wrapped = F.pad(x, (2, 2, 2, 2), mode="circular")
    x = act((F.conv2d(wrapped, weight(q.conv2), q.conv2.bias, dilation=2, groups=4) + x).relu(), q.relu)
    x = act(F.conv2d(x, weight(q.conv3), stride=2).clamp(0, 6), q.relu6)
    torch.testing.assert_close(q(X), F.linear(act(x.mean((2, 3)), q.fc), weight(q.fc), q.fc.bias))


def test_few_values():
    _, q = net(quantizer="proxq", weight_bits=3, act_bits=2, per_channel=True)
    calibrate(q, X)
    seen: dict[str, Tensor] = {}
    for name, m in q.named_modules():
        if isinstance(m, QuantReLU):
            m.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    q(X)
    assert all(len(out.unique()) <= 4 for out in seen.values()) and len(seen) == 2
    for row in q.conv2.weight_quant(q.conv2.weight):
        assert len(row.unique()) <= 7


def test_transformer_is_quantized_in_eval_mode():
    """torch computes such a layer from its float weights where it can."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), 1)
    q = quantize_model(model, weight_bits=2, first_last_bits=None)
    x = torch.randn(2, 5, 8)
    calibrate(q, x)
    layers = [f"layers.0.{name}" for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")]
    assert layers == list(q.quantization.swapped)
    with torch.no_grad():
        exact = model.eval()(x)
        assert torch.equal(q.eval()(x), q.train(False)(x.clone())) and not torch.allclose(q(x), exact, atol=1e-2)
        for layer in map(q.get_submodule, layers):
            layer.weight_quant = layer.act_quant = nn.Identity()
        torch.testing.assert_close(q(x), exact)


# State dicts


def test_float_state_dict():
    """Loads strictly, before and after; its entries are those of the float model under the same names."""
    model, q = net()
    state = Net().state_dict()
    calibrate(q, X)
    q.load_state_dict(state)
    assert all(torch.equal(q.state_dict()[name], value) for name, value in state.items())
    model.load_state_dict(state)
    other = quantize_model(model, "lsq")
    with pytest.warns(UserWarning, match="were not set"):  # the steps of the former weights are no longer of use
        q.eval()(X)
    calibrate(other.eval(), X)  # in the mode that it is in
    torch.testing.assert_close(q(X), other(X))
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        q.load_state_dict({name: value for name, value in state.items() if name != "fc.bias"})


def test_state_dict_with_steps(tmp_path):
    """Loads into a fresh model, which does not calibrate; so does a file."""
    _, q = net()
    calibrate(q, X)
    torch.save(q.state_dict(), tmp_path / "q.pt")
    _, fresh = net(seed=1)
    fresh.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fresh.eval()(3 * X), q.eval()(3 * X))
    lacking = {k: v for k, v in Net().state_dict().items() if k != "conv1.weight"}
    with pytest.raises(RuntimeError, match=r"conv1\.weight"):
        fresh.load_state_dict(lacking)


# Calibration
