"""A network as ONNX: integers of every quantizer, the forms against the network, and the command line."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import lifequant
from lifequant import registry
from lifequant.common.arguments import run_main
from lifequant.exporting import api, command, integers, run
from lifequant.exporting.parity import compare
from lifequant.qat.folding import FoldedWeight
from lifequant.qat.layers import QuantConv2d, QuantReLU, fake_quants
from lifequant.quantizers.base import BIT_WIDTHS, FakeQuant
from lifequant.runtime.onnx_session import session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

QUANTIZERS = sorted(registry.names("quantizer"))
BITS = [b for b in BIT_WIDTHS if b < 32]


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("channels", [None, 6])
def test_weights_are_a_scale_times_integers(name, channels):
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3) * 0.2 + 0.03
    for bits in BITS:
        quant = registry.quantizer(name).weight(bits, channels)
        quant.calibrate(weight)
        for given in (quant, FoldedWeight(quant, torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0, 1e-3]))):
            found = integers.weight_codes(given, weight)
            scale = found.scale.double().view(-1, 1, 1, 1)
            values = given(weight).double()
            assert torch.allclose(scale * found.codes, values, rtol=1e-5, atol=1e-7 * float(values.abs().max()))
            assert (found.scale > 0).all() and len(found.codes.unique()) <= 2 * len(quant.codes(weight).unique())


@torch.no_grad()
@pytest.mark.parametrize("name", QUANTIZERS)
def test_activations_are_levels(name):
    x = torch.linspace(-1, 4, 20001)
    for bits in BITS:
        quant = registry.quantizer(name).activation(bits)
        quant.calibrate(x.relu())
        found = integers.activation_levels(quant)
        expected = (quant(x).relu() if quant.before_relu else quant(x)).double()
        levels = integers.as_levels(found) if isinstance(found, integers.Steps) else found
        index = np.searchsorted(levels.thresholds.numpy(), x.double().numpy())
        off = np.abs(levels.values.numpy()[index] - expected.numpy()) > 1e-5
        assert off.mean() < 1e-3  # at thresholds
        if (exact := integers.integer_levels(levels)) is not None:
            assert np.allclose(exact[0].double() * exact[1], levels.values, rtol=1e-5, atol=1e-7)
        codes, scale, zero = integers.on_grid(levels)
        assert ((codes.double() - zero) * scale - levels.values).abs().max() <= 0.501 * scale
        assert codes[(levels.values == 0).nonzero()].eq(zero).all()


class Branch(nn.Module):
    """What a residual network has, with one quantizer throughout."""

    def __init__(self, name, bits):
        super().__init__()
        family = registry.quantizer(name)
        self.conv1 = QuantConv2d(3, 8, 3, 1, 1, family.weight(8))
        self.conv2 = QuantConv2d(8, 8, 3, 1, 1, family.weight(bits))
        self.conv3 = QuantConv2d(8, 16, 3, 2, 1, family.weight(bits))
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(16)
        self.relu1, self.relu2, self.relu3 = (QuantReLU(family.activation(bits)) for _ in range(3))

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + x)
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.relu3(self.bn3(self.conv3(x)) + short).mean((2, 3))


class Branches(nn.Module):
    """A branch for each quantizer, so that torch.onnx, which takes seconds, is asked once."""

    def __init__(self, bits):
        super().__init__()
        self.branches = nn.ModuleList(Branch(name, bits) for name in QUANTIZERS)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


@pytest.fixture(scope="module")
def nine():
    return calibrated_branches(4)


def calibrated_branches(bits):
    """(network of all quantizers, calibrated, with BatchNorms of its own and gammas of both signs; images)"""
    torch.manual_seed(0)
    q, x = Branches(bits), torch.randn(64, 3, 12, 12)
    for module in q.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.normal_(module.bias, 0.2, 0.3)
    for layer in q.modules():
        if isinstance(layer, QuantConv2d):
            layer.weight_quant.calibrate(layer.weight)
    hooks = [
        quant.register_forward_pre_hook(lambda m, args: m.calibrate(args[0]))
        for n, quant in fake_quants(q)
        if n.endswith("act_quant")
    ]
    q.train()
    with torch.no_grad():
        for module in q.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        q(x)
    for hook in hooks:
        hook.remove()
    for module in q.modules():
        if isinstance(module, FakeQuant):
            module.calibrated = True
    return q.eval(), x


@pytest.mark.parametrize("integer, weights", [("exact", "int8"), ("fast", "int8"), ("exact", "int4")])
def test_every_quantizer_in_every_form(nine, tmp_path, integer, weights):
    q, x = nine
    made = api.export(q, tmp_path / "q.onnx", x[:4], integer, weights, [x])
    with torch.no_grad():
        expected = q(x).numpy().reshape(len(x), len(QUANTIZERS), -1)
    given = run.outputs((tmp_path / "q.onnx").read_bytes(), [x.numpy()]).reshape(expected.shape)
    for at, name in enumerate(QUANTIZERS):
        error = np.abs(given[:, at] - expected[:, at])
        size = expected[:, at].std()
        if integer == "exact":  # a value in the middle of two codes may be rounded either way
            assert np.median(error) < 1e-5 * size and (error > 1e-4 * size).mean() < 0.1, name
        else:
            assert np.sqrt((error**2).mean()) < 0.15 * size, name
    convolutions = 3 * len(QUANTIZERS)
    if integer == "fast":
        assert (made.integer_convolutions, made.float_convolutions) == (convolutions, 0)
    elif weights == "int8":
        assert made.float_convolutions == len(QUANTIZERS)  # the image is float
    else:
        assert made.float_convolutions == convolutions
        stored = [t.data_type for t in onnx.load(tmp_path / "q.onnx").graph.initializer]
        assert stored.count(onnx.TensorProto.INT4) == 2 * sum(n not in ("apot", "uniform") for n in QUANTIZERS)
    if integer == "exact":
        refuse_slow_weights(tmp_path / "q.onnx")
    assert onnx.checker.check_model(str(tmp_path / "q.onnx")) is None


def refuse_slow_weights(path):
    """onnxruntime has the weights of a float convolution as constants, and an integer one's are unsigned."""
    session(path, 1, str(path.with_name("optimized.onnx")))
    graph = onnx.load(path.with_name("optimized.onnx")).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if "Conv" in node.op_type:
            kind = onnx.TensorProto.UINT8 if node.op_type == "ConvInteger" else onnx.TensorProto.FLOAT
            assert types.get(node.input[1]) == kind, node


def test_signed_inputs_and_relu6(tmp_path):
    """MobileNet-V2's block: grouped convolutions, ReLU6, a linear bottleneck with a sum."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
            self.wide = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.ReLU6())
            self.deep = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
            self.out, self.fc = nn.Sequential(nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8)), nn.Linear(8, 5)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.out(self.deep(self.wide(x)))
            return self.fc(x.mean((2, 3)))

    x, block = 3 * torch.randn(64, 3, 8, 8), Block()
    block.deep[1].weight.data[:2] = 0.0  # channels that are dead, one of them with a bias
    block.deep[1].bias.data[0] = 0.5
    q = lifequant.quantize_model(block, first_last_bits=4)
    lifequant.calibrate(q, [x], train=True)
    q.eval()
    exact = api.export(q, tmp_path / "q.onnx", x[:1], "exact", calibration=[x])
    assert exact.parity.difference < 0.3 and exact.parity.equal > 95 and exact.integer_convolutions == 3
    fast = api.export(q, tmp_path / "q.onnx", x[:1], "fast", calibration=[x])
    assert (fast.integer_convolutions, fast.float_convolutions) == (4, 0) and fast.parity.equal > 80
    kernels = run.kernels((tmp_path / "q.onnx").read_bytes())
    assert kernels["QGemm"] == 1 and not kernels["Gemm"]
    api.export(q, tmp_path / "small.onnx", x[:1], "fast", "int4", [x])
    stored = onnx.load(tmp_path / "small.onnx").graph.initializer
    types = [t.data_type for t in stored if t.name.startswith("codes")]
    assert types.count(onnx.TensorProto.INT4) == 5
    for batch in (1, 3):  # n is free
        assert run.outputs((tmp_path / "q.onnx").read_bytes(), [x[:batch].numpy()]).shape == (batch, 5)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A short 4-bit run of two tasks."""
    job = tmp_path_factory.mktemp("export") / "run"
    flags = ["--csv_dir", tiny.csvs, "--data_dir", tiny.images, "--bitW", 4, "--num_epochs", 1, "--image_size", 16]
    from lifequant.__main__ import main

    assert main(["train", *map(str, flags), "--train_batch_size", "8", "--job_dir", str(job)]) == 0
    return job


def test_command_line(trained, capsys):
    before = sorted(p.name for p in trained.iterdir())
    assert run_main(command.main, [str(trained), "--integer", "exact", "--task", "0"]) == 0
    printed = capsys.readouterr().out
    assert "18 convolutions in integers and 1 in float" in printed and "test images of the run" in printed
    file = onnx.load(trained / "model_exact.onnx")
    facts = {entry.key: entry.value for entry in file.metadata_props}
    results = json.loads((trained / "results.json").read_text())
    assert json.loads(facts["class_names"]) and facts["tasks"] == "1"
    assert float(facts["accuracy"]) == pytest.approx(results["top1"][0][0], abs=0.01)
    (given,) = file.graph.input
    assert given.name == "images" and given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [output.name for output in file.graph.output] == ["logits"]
    assert sorted(p.name for p in trained.iterdir()) == sorted([*before, "model_exact.onnx"])
    (trained / "model_exact.onnx").unlink()


def test_packed_on_the_command_line(trained, capsys):
    assert run_main(command.main, [str(trained), "--format", "packed"]) == 0
    assert "100.00 % equal predictions, largest difference of logits 0" in capsys.readouterr().out
    claimed = json.loads((trained / "results.json").read_text())["memory_bytes"]["packed_model"]
    file = trained / "model.safetensors"
    assert 1 <= file.stat().st_size / claimed < 1.05
    assert run_main(command.main, [str(file), "--format", "packed"]) == 2
    assert "is packed already" in capsys.readouterr().err
    file.unlink()


def test_no_file_where_predictions_differ(trained, capsys, monkeypatch):
    monkeypatch.setattr(command.run, "outputs", lambda content, batches: np.zeros((sum(map(len, batches)), 6)))
    assert run_main(command.main, [str(trained), "--integer", "exact"]) == 1
    assert "is not written" in capsys.readouterr().err
    assert not (trained / "model_exact.onnx").exists()


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--task", "7"], "there are tasks 0, 1"),
        (["--format", "packed", "--integer", "exact"], "--integer and --weights are of --format onnx"),
        (["--out", "nowhere/at/all.onnx"], "its folder is not there"),
        (["--images", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_bad_input(trained, capsys, flags, text):
    assert run_main(command.main, [str(trained), *flags]) == 2
    assert text in capsys.readouterr().err


def test_packages_that_are_missing_or_too_old(monkeypatch, capsys):
    monkeypatch.setitem(run.OLDEST, "onnxruntime", (99, 0))
    assert run_main(command.main, ["nowhere"]) == 2
    assert "onnxruntime 99.0 or newer" in capsys.readouterr().err


def test_parity_counts_what_chance_can_not_explain():
    labels = np.zeros(1000, int)
    network = np.eye(2)[np.zeros(1000, int)]
    worse = np.eye(2)[(np.arange(1000) < 10).astype(int)]  # ten right ones become wrong, and none right
    assert "loses 1.00 points" in compare(network, worse, labels).failure("fast")
    assert not compare(network, worse, labels).excuse()
    both = np.eye(2)[
        (np.arange(1000) < 40).astype(int)
    ]  # 40 wrong ones here, 36 of which are right there, and 40 others
    moved = np.eye(2)[((np.arange(1000) >= 36) & (np.arange(1000) < 80)).astype(int)]
    parity = compare(both, moved, labels)
    assert parity.lost == pytest.approx(0.4) and not parity.failure("fast") and parity.failure("exact")
    assert "the loss of 0.40 points may be chance" in parity.excuse()
