"""What is kept and computed in few bits: the penalty's anchors, bfloat16 beside float32 quantizers; and the GPU's step."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equal import Killed, kill_at, read, same
from support.tiny import Tiny, train

from lifequant import registry
from lifequant import train as training
from lifequant.data.task import Task
from lifequant.penalties.base import codes_and_scale
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.layers import QuantConv2d, QuantReLU, Scheme

LINEAR = {"lsq", "lsqplus", "llsq", "proxq"}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def interrupted(tiny: Tiny, job: Path, **flags: Any) -> None:
    """A run that dies in the second step of task 1 and goes on."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, training, "training_step", 6)
        with pytest.raises(Killed):
            train(tiny, job, checkpoint_seconds=0, **flags)
    train(tiny, job, checkpoint_seconds=0, resume="True", **flags)


def same_runs(a: Path, b: Path) -> None:
    same(read(a), read(b))
    states = [torch.load(job / "checkpoint/last.pt", weights_only=True) for job in (a, b)]
    same(*states)


def layer_of(name: str, per_channel: bool, bits: int) -> QuantConv2d:
    quantizer = registry.quantizer(name)
    torch.manual_seed(bits)
    layer = Scheme(quantizer, quantizer, bits, bits, per_channel=per_channel).conv(5, 7, 3)
    if bits != 32:
        layer.weight_quant.calibrate(layer.weight)
    return layer


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_anchors_are_exact(name, per_channel):
    """The anchor times its unit is the quantized weight to the bit; a byte a weight where that can be."""
    for bits in (2, 3, 4, 8, 32):
        layer = layer_of(name, per_channel, bits)
        with torch.no_grad():
            layer.weight.mul_(1.37).add_(0.01)  # the step was set for other weights
            expected = layer.weight_quant(layer.weight)
        anchor, unit = codes_and_scale(layer.weight_quant, layer.weight)
        assert torch.equal(anchor * unit, expected), bits
        assert (anchor.dtype == torch.int8) == (name in LINEAR and bits != 32)


def test_anchors_of_a_run(tiny, tmp_path):
    """A run's checkpoint holds the anchors as int8, and they are the model's weights at the end of task 0."""
    train(tiny, tmp_path / "run", method="ours")
    first = torch.load(tmp_path / "run/checkpoint/task0.pt", weights_only=True)["model"]
    kept = torch.load(tmp_path / "run/checkpoint/last.pt", weights_only=True)["penalty"]
    assert len(kept["anchor"]) == 19 and all(a.dtype == torch.int8 for a in kept["anchor"].values())
    quant = registry.quantizer("proxq").weight(4)
    quant.alpha.copy_(first["layer2.0.conv1.weight_quant.alpha"])
    value = kept["anchor"]["layer2.0.conv1"] * kept["scale"]["layer2.0.conv1"]
    assert torch.equal(value, quant(first["layer2.0.conv1.weight"]))


@pytest.mark.parametrize("name", registry.names("quantizer"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizers_compute_in_float32(name, dtype):
    """An input of a half type has the codes of the same numbers in float32, and the values in its own type; so have weights
    of a module that becomes one, whose own numbers stay in float32."""
    for bits in (4, 8):
        quant = registry.quantizer(name).activation(bits)
        x = torch.randn(64, 33, generator=torch.Generator().manual_seed(bits)).to(dtype)
        quant.calibrate(x.float().relu())
        relu = QuantReLU(quant)
        expected = relu(x.float())
        assert torch.equal(relu(x), expected.to(dtype)) and expected.dtype == torch.float32
        assert torch.equal(relu.to(dtype)(x), expected.to(dtype))
        layer = layer_of(name, True, bits)
        weight = layer.weight.detach().to(dtype)
        expected = layer.weight_quant(weight.float()), layer.weight_quant.codes(weight.float())
        layer.to(dtype)
        assert torch.equal(layer.weight_quant(layer.weight), expected[0].to(dtype))
        assert torch.equal(layer.weight_quant.codes(layer.weight), expected[1])
        assert all(t.dtype == torch.float32 for t in layer.weight_quant.state_dict().values())
    assert QuantReLU(torch.nn.Identity())(x).dtype == dtype  # at 32 bits nothing is quantized


def test_amp_takes_the_convolutions_alone():
    """Under autocast convolutions give and take bfloat16, gradients are float32."""
    torch.manual_seed(0)
    quantizer = registry.quantizer("lsq")
    net = registry.model("resnet20")(5, Scheme(quantizer, quantizer))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    calibrate_network(net, x)
    seen: dict[str, torch.dtype] = {}
    for name, module in net.named_modules():
        if isinstance(module, QuantConv2d):
            module.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, out.dtype))
    values: list[torch.dtype] = []
    net.layer1[0].relu1.act_quant.register_forward_hook(lambda m, args, out: values.extend((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    logits.float().square().sum().backward()
    assert set(seen.values()) == {torch.bfloat16} and len(seen) == 19 and set(values) == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())
    close = (logits.float() - net(x)).abs().max() / net(x).abs().max()
    assert 0 < close < 0.2


def test_amp_run(tiny, tmp_path, capsys):
    """A run in bfloat16 trains other numbers than one in float32, and goes on to the same bits when it is killed. It says if the
    CPU emulates them."""
    cpuinfo, runs = Path("/proc/cpuinfo"), {}
    for amp in ("off", "bf16"):
        runs[amp] = train(tiny, tmp_path / amp, method="ours", amp=amp)
        said = training.EMULATED in " ".join(capsys.readouterr().out.split())
        assert not said or amp == "bf16"
    if platform.machine() == "x86_64" and cpuinfo.is_file():
        assert said == (not {"avx512_bf16", "amx_bf16"} & set(cpuinfo.read_text().split()))
    weights = [torch.load(tmp_path / amp / "model_best.pt", weights_only=True)["model"] for amp in runs]
    assert not torch.equal(weights[0]["layer1.0.conv1.weight"], weights[1]["layer1.0.conv1.weight"])
    assert runs["bf16"]["config"]["amp"] == "bf16"
    interrupted(tiny, tmp_path / "killed", method="ours", amp="bf16")
    same_runs(tmp_path / "killed", tmp_path / "bf16")


def test_deterministic_algorithms(tiny, tmp_path, monkeypatch):
    """--deterministic holds in every step, and no longer than the run."""
    seen: list[bool] = []
    step = training.training_step
    monkeypatch.setattr(
        training, "training_step", lambda *a: seen.append(torch.are_deterministic_algorithms_enabled()) or step(*a)
    )
    train(tiny, tmp_path / "run", method="ours", deterministic=True)
    assert seen and all(seen) and not torch.are_deterministic_algorithms_enabled()


@GPU
def test_steps_do_not_wait_for_the_gpu(tiny, tmp_path, monkeypatch):
    """Between two readings of the loss nothing makes the host wait for the device."""
    step, batch_of = training.training_step, Task.training_batch

    def watched(function):
        def call(*args):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    monkeypatch.setattr(training, "training_step", watched(step))
    monkeypatch.setattr(Task, "training_batch", watched(batch_of))
    train(tiny, tmp_path / "run", method="ours", device="cuda", num_epochs=2)


@GPU
@pytest.mark.parametrize("compile", ["off", "on"])
def test_resumed_on_the_gpu(tiny, tmp_path, compile):
    """With deterministic algorithms a killed run ends as an uninterrupted one does, to the bit."""
    flags = {"method": "ours", "device": "cuda", "deterministic": True, "compile": compile}
    train(tiny, tmp_path / "whole", **flags)
    interrupted(tiny, tmp_path / "killed", **flags)
    same_runs(tmp_path / "killed", tmp_path / "whole")
