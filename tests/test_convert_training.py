"""A quantized model's scales from data, and its training in a loop of one's own."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.converted import X, net
from support.small_net import SmallNet
from torch import Tensor, nn

from lifequant import calibrate, quantize_model, registry
from lifequant.qat.layers import QuantConv2d, QuantLinear, Scheme, fake_quants
from lifequant.qat.scales import Scales, param_groups
from lifequant.quantizers.first_steps import least_error, sample_with_extremes

EXAMPLES = Path(__file__).parent / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:calibrate. .* input that no quantizer gave")


def test_first_forward_calibrates_and_says_so_once():
    _, q = net()
    _, other = net()
    calibrate(other.eval(), X)
    twin = copy.deepcopy(q)
    for model in (q, twin):
        with pytest.warns(UserWarning, match="were not set"):
            model.eval()(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(2 * X)
        assert steps(model) == pytest.approx(steps(other)) and not model._forward_pre_hooks


def steps(q: nn.Module) -> dict[str, float]:
    return {name: quant.step_size.item() for name, quant in fake_quants(q)}


def lsq_step(x: Tensor, qp: int) -> float:
    x = x.detach().double().abs()
    return min(2 * x.mean().item() / qp**0.5, x.max().item() / qp)


def test_steps_against_a_pass_by_hand():
    """Layer after layer; of a ReLU used twice, both uses in all batches, each with the step known by then."""
    _, q = net()
    initial = copy.deepcopy(q)
    identities = [id(p) for p in q.parameters()]
    buffers = {name: b.clone() for name, b in q.named_buffers()}
    batches = [(X[:3], None), (X[3:], None)]
    random = torch.get_rng_state()
    calibrate(q, batches)
    assert torch.equal(random, torch.get_rng_state()) and q.training and q.drop.training
    assert identities == [id(p) for p in q.parameters()]
    assert all(torch.equal(b, buffers[name]) for name, b in q.named_buffers() if not name.endswith("is_set"))
    assert q.quantization.float_inputs == q.quantization.images == ["conv1"] and q.quantization.shared == {"relu": 2}
    assert q.quantization.unreached == []

    expected = {}
    for name, layer in q.named_modules():
        if isinstance(layer, QuantConv2d | QuantLinear):
            expected[f"{name}.weight_quant"] = lsq_step(layer.weight, 2 ** (layer.weight_quant.bits - 1) - 1)
    weights = {n: m.weight_quant(m.weight) for n, m in q.named_modules() if hasattr(m, "weight_quant")}
    seen: dict[str, list[Tensor]] = {"relu": [], "relu6": [], "fc": []}

    def act(x: Tensor, name: str) -> Tensor:
        seen[name].append(x)
        values = torch.cat([v.flatten() for v in seen[name]])
        s = expected[f"{name}.act_quant"] = least_error(sample_with_extremes(values[values > 0]), 0, 15)[0]
        return (x / s).round().clamp(0, 15) * s

    for x, _ in batches:
        x = F.conv2d(x, weights["conv1"], q.conv1.bias, padding=1)
        x = act(F.batch_norm(x, None, None, q.bn.weight, q.bn.bias, training=True).relu(), "relu")
        wrapped = F.pad(x, (2, 2, 2, 2), mode="circular")
        x = act((F.conv2d(wrapped, weights["conv2"], q.conv2.bias, dilation=2, groups=4) + x).relu(), "relu")
        x = act(F.conv2d(x, weights["conv3"], stride=2).clamp(0, 6), "relu6")
        act(x.mean((2, 3)), "fc")
    assert steps(q) == pytest.approx(expected, rel=1e-5)
    assert steps(q) != pytest.approx(steps(initial), rel=1e-2)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        calibrate(q, batches)


def test_one_batch_as_in_the_training_code():
    """The same steps as calibrate() of the layers gives our own networks."""
    from lifequant.qat.calibration import calibrate_network as of_layers

    torch.manual_seed(0)
    family = registry.quantizer("lsq")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())
    q = quantize_model(model, "lsq")
    calibrate(q, X)
    own = copy.deepcopy(q)
    of_layers(own, X)
    assert steps(own) == pytest.approx(steps(q), rel=1e-6)
    assert all(quant.calibrated for _, quant in fake_quants(own))
    ours = SmallNet(Scheme(family, family))
    assert not any(quant.calibrated for _, quant in fake_quants(ours))


def test_functional_relu_and_unreached_layers():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.never = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(self.relu(self.a(x)), 2)
            return self.c(F.relu(self.b(torch.cat([x, x], 2))))

    with pytest.warns(UserWarning, match=r"in Hidden, .* inputs of 1 of 4 .* \(c\)"):
        q = quantize_model(Hidden(), inputs="relu")
    with pytest.warns(UserWarning, match="1 layers were not reached: never"):
        calibrate(q, X)
    assert q.quantization.float_inputs == ["a", "c"] and q.quantization.unreached == ["never"]
    assert "2  float input" in str(q.quantization)


def test_inputs_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, *, image: Tensor) -> Tensor:
            return self.relu(input=self.conv(input=image))

    q = quantize_model(Named())
    with pytest.warns(UserWarning, match="were not set"):
        assert len(q(image=X).unique()) <= 16
    assert q.quantization.float_inputs == ["conv"]


def test_a_frozen_batchnorm_stays_frozen():
    _, q = net()
    q.bn.eval()
    calibrate(q, X)
    assert q.training and not q.bn.training
    q.eval()
    step = steps(q)
    calibrate(
        q, X[:1]
    )  # BatchNorm has no statistics of one image of one pixel; of one image, its running ones are used
    assert not q.training and steps(q) != step


# Training


@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_every_quantizer_trains(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    q = quantize_model(model, name)
    calibrate(q, [(X, None)])
    optimizer = torch.optim.SGD(param_groups(q, 0.05, weight_decay=1e-4), momentum=0.9)
    steps = Scales(q)
    y, losses = torch.arange(6) % 5, []
    for _ in range(10):
        loss = F.cross_entropy(q(X), y)
        optimizer.zero_grad()
        loss.backward()
        with steps.limit_scale_updates():
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    if "exceed" not in str(q.quantization) and not q[0].weight_quant.exceeds_bits:
        assert len(q[3].weight_quant(q[3].weight).unique()) <= 16


def test_param_groups():
    _, q = net(act_quantizer="pact")
    groups = {(g["lr"], g["weight_decay"]): g["params"] for g in param_groups(q, 0.1, weight_decay=0.5)}
    assert [len(groups[key]) for key in ((0.1, 0.5), (0.1 * 0.1, 0.0), (0.1 * 0.1, 0.5))] == [9, 4, 3]
    steps, before = Scales(q), q.conv1.weight_quant.step_size.item()
    with steps.limit_scale_updates():
        q.conv1.weight_quant.step_size.data.fill_(-1.0)
    assert q.conv1.weight_quant.step_size.item() == pytest.approx(0.9 * before)


def test_compiles_whole():
    torch.manual_seed(0)
    q = quantize_model(torchvision.models.resnet18(num_classes=4)).eval()
    x = torch.randn(2, 3, 32, 32)
    calibrate(q, x)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(q, fullgraph=True, backend="aot_eager")(x), q(x))
    _, small = net()
    calibrate(small, X)
    torch.compile(small, fullgraph=True, backend="aot_eager")(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


# Examples


def run(name: str, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_torchvision():
    assert len((EXAMPLES / "quantize_torchvision.py").read_text().splitlines()) < 40
    found = re.findall(
        r"^(\w+): loss (\S+) -> (\S+)$", run("quantize_torchvision.py", "squeezenet1_1", "resnet18"), re.M
    )
    assert [name for name, *_ in found] == ["squeezenet1_1", "resnet18"]
    assert all(float(last) < float(first) for _, first, last in found)


def test_example_own_loop():
    found = re.findall(r"^(\w+): first task (\S+) %, (\S+) % among", run("own_loop.py"), re.M)
    whole, among = ({name: float(row[i]) for name, *row in found} for i in (0, 1))
    assert whole["ours"] > whole["original"] + 40
    assert among["ewc"] > among["original"] + 4 and among["ours"] > among["original"] + 4
