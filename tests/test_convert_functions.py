"""quantize_model on models that call ReLU as a function. What it says at once is compared with what calibrate measures."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lifequant import calibrate, quantize_model


class Net(nn.Module):
    """Four convolutions and a Linear layer. ``relu`` stands behind three of them, a ReLU module behind the second."""

    def __init__(self, relu) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.relus = nn.ModuleList([relu() if isinstance(relu, type) else nn.Identity() for _ in range(3)])
        self.function = (lambda x: x) if isinstance(relu, type) else relu
        self.module, self.pool, self.dropout, self.fc = nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Linear(128, 10)

    def call(self, place, x):
        return self.function(self.relus[place](x))

    def forward(self, x, features=False):
        x = self.pool(self.call(0, self.convs[0](x)))
        x = self.module(self.convs[1](x))
        x = torch.cat([self.call(1, self.convs[2](x)), self.convs[3](x).mean(1, keepdim=True)[:, :0]], 1)
        x = F.max_pool2d(self.call(2, self.convs[3](x)), 2)
        return x if features else self.fc(self.dropout(x.flatten(1)))


def quantized(model: nn.Module, size: int = 16) -> tuple[nn.Module, list[str]]:
    """The quantized model, calibrated, and what quantize_model warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        q = quantize_model(model, inputs="relu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate(q, torch.randn(2, 3, size, size))
    return q, [str(warning.message) for warning in said]


@pytest.mark.parametrize(
    "relu",
    [F.relu, torch.relu, F.relu6, lambda x: x.relu(), lambda x: x.relu_(), lambda x: F.relu(x, inplace=True)],
    ids=["F.relu", "torch.relu", "F.relu6", "x.relu", "x.relu_", "inplace"],
)
def test_it_says_so_at_once(relu):
    """Which layers, of how many, and what to do; with modules in their place those inputs are quantized."""
    torch.manual_seed(0)
    q, (said,) = quantized(Net(relu))
    behind = ["convs.1", "convs.3", "fc"]
    assert q.quantization.behind_functions == behind and set(behind) <= set(q.quantization.float_inputs)
    assert "in Net, " in said and "inputs of 3 of 5 " in said and "convs.1, convs.3, fc" in said and "nn.ReLU()" in said
    assert "3  float input, behind a ReLU called as a function: convs.1" in str(q.quantization)
    torch.manual_seed(0)
    better, said = quantized(Net(nn.ReLU))
    assert not said and better.quantization.behind_functions == [] and better.quantization.float_inputs == ["convs.0"]


class Twice(nn.Module):
    """A function on what a module quantized already, and one whose result no layer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU()

    def forward(self, x):
        return F.relu(self.b(F.relu(self.relu(self.a(x)))))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x))) if x.sum() > -1e9 else x


def test_nothing_is_said_where_it_is_not_so():
    """A model that can't be traced is found out by calibrate, as a model of modules alone is."""
    for model, float_inputs in ((Twice(), ["a"]), (Untraceable(), ["a", "b"])):
        q, said = quantized(model)
        assert said == [] and q.quantization.float_inputs == float_inputs
    assert "left: Twice, calls ReLU as a function 2 times" in str(quantized(Twice())[0].quantization)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            quantize_model(Net(F.relu), act_bits=32, inputs="relu").quantization.behind_functions == []
        )  # all inputs stay float


def test_torchvision():
    """Those of modules alone say nothing; GoogLeNet has no ReLU module, and each layer that is named has a float input."""
    for name in ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (
                quantize_model(getattr(torchvision.models, name)(), inputs="relu").quantization.behind_functions == []
            )
    q, (said,) = quantized(torchvision.models.googlenet(init_weights=False, num_classes=10), 64)
    assert "in BasicConv2d, InceptionAux, " in said and "inputs of 60 of 64 " in said
    assert set(q.quantization.behind_functions) <= set(q.quantization.float_inputs)


def test_transformer_layers():
    """Their activation is a function unless a module is given."""
    with pytest.warns(UserWarning, match="in TransformerEncoderLayer, .* inputs of 1 of 2 .*linear2"):
        quantize_model(nn.TransformerEncoderLayer(16, 2, 32), inputs="relu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for activation in (nn.ReLU(), "gelu"):
            quantize_model(nn.TransformerEncoderLayer(16, 2, 32, activation=activation), inputs="relu")


class Busy(Net):
    """Its forward prints, counts, draws and changes a parameter."""

    def __init__(self) -> None:
        super().__init__(F.relu)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        print("busy")
        self.calls += 1
        with torch.no_grad():
            self.fc.bias.add_(torch.rand(10))
        return super().forward(x)


def test_the_model_is_left_alone(capsys):
    model, seen = Busy(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.convs[1].register_forward_pre_hook(lambda *_: seen.append(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="inputs of 3 of 5 "):
        q = quantize_model(model, inputs="relu")
    assert seen == [] and capsys.readouterr().out == "" and torch.equal(torch.get_rng_state(), state)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value) and torch.equal(q.state_dict()[name], value)


def test_the_report_is_80_columns_wide():
    """With names as long as they come."""
    long = "a_block_with_a_name_that_is_as_long_as_names_come"
    net = nn.Sequential()
    for i in range(6):
        net.add_module(f"{long}{i}", nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Hardswish(), Net(F.relu)))
    net.add_module(3 * long, nn.Conv2d(3, 3, 3))
    with pytest.warns(UserWarning):
        report = str(quantize_model(net, inputs="relu").quantization)
    assert max(map(len, report.splitlines())) <= 80 and long + "5" in report and "behind a ReLU" in report
