"""ResNets against a forward pass written out in plain functions; their published sizes; bytes by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant import options, registry
from lifequant.models.build import build
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.code_usage import code_counts
from lifequant.qat.layers import fake_quants
from lifequant.qat.packing import packed_model_bytes


def network(classes: int = 10, **settings) -> nn.Module:
    return build(options.make(**settings), classes)


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269_722), ("resnet56", 853_018)])
def test_published_sizes(name, parameters):
    """With shortcuts of option A and BatchNorm's affine (He et al. 2016: 0.27 M and 0.85 M)."""
    model = network(target_model=name, bitW=32)
    assert sum(p.numel() for p in model.parameters()) == parameters


def reference(state: dict[str, Tensor], x: Tensor, blocks: int, shortcut: str) -> Tensor:
    """He et al. 2016, sec. 4.2, from the weights' names."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / (var + 1e-5).sqrt()
        return (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + state[f"{name}.bias"].view(-1, 1, 1)

    x = norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for place in range(blocks):
            name, stride = f"layer{stage}.{place}", 2 if stage > 1 and place == 0 else 1
            out = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
            out = norm(F.conv2d(out, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2 and shortcut == "conv":
                x = norm(F.conv2d(x, state[f"{name}.shortcut.conv.weight"], stride=2), f"{name}.shortcut.bn")
            elif stride == 2:
                half = x.shape[1] // 2
                zeros = torch.zeros_like(x[:, :half, ::2, ::2])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (out + x).relu()
    assert x.shape[1:] == (64, 8, 8)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("shortcut", ["A", "conv"])
def test_forward(shortcut):
    """At 32 bits, with BatchNorm statistics of its own, in double precision."""
    torch.manual_seed(0)
    model = network(bitW=32, shortcut=shortcut).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model.train()(x)
    model.eval()
    torch.testing.assert_close(model(x), reference(model.state_dict(), x, 3, shortcut))


@pytest.mark.parametrize("quantizer", registry.names("quantizer"))
def test_float_weights_fit_every_width(quantizer):
    """A float network's weights go by the same names; the quantizers' own entries apart, nothing is left over."""
    names = set(network(bitW=32, quantizer=quantizer).state_dict())
    for bits in (8, 2):
        own = set(network(bitW=bits, quantizer=quantizer).state_dict())
        assert names <= own and all("_quant." in name for name in own - names)


def test_packed_bytes():
    """Codes of 4 bits, the edges of 8, a step of 4 bytes a tensor; the rest in float32."""
    convolutions = 6 * 16 * 16 * 9 + 16 * 32 * 9 + 5 * 32 * 32 * 9 + 32 * 64 * 9 + 5 * 64 * 64 * 9
    edges = 16 * 3 * 9 + 64 * 10
    norm = 4 * (16 + 6 * 16 + 6 * 32 + 6 * 64)  # weight, bias, mean and variance
    steps = 20 + 20  # weights; activations
    expected = convolutions // 2 + edges + 4 * (norm + steps + 10)
    for quantizer in ("lsq", "proxq"):
        assert packed_model_bytes(network(quantizer=quantizer, bitW=4)) == expected
    full = 4 * (convolutions + edges + norm + 10)
    assert packed_model_bytes(network(bitW=32)) == full


def test_code_counts():
    """Of weights and of activations in eval mode; the network stays as it was."""
    model = network(quantizer="lsq")
    x = torch.randn(8, 3, 16, 16)
    calibrate_network(model, x)
    model(3 * x + 1)  # statistics that are not this batch's
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = code_counts(model, x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()) and model.training
    layer, quant = model.conv1, model.relu.act_quant
    inside = model.eval().bn1(F.conv2d(x, layer.weight_quant(layer.weight), padding=1)).relu()
    expected = (inside / quant.scale()).round().clamp(0, 15).flatten().long().bincount(minlength=16)
    assert found["relu.act_quant"][2].tolist() == expected.tolist()
    codes = (layer.weight / layer.weight_quant.scale()).round().clamp(-128, 127).flatten().long()
    assert found["conv1.weight_quant"][2].tolist() == (codes + 128).bincount(minlength=256).tolist()


def lsq_step(v: Tensor, qp: int) -> tuple[float, str]:
    """LSQ's initial step of weights, and which of its two bounds it is."""
    v = np.abs(v.detach().double().numpy())
    return min((2 * v.mean() / np.sqrt(qp), "mean"), (v.max() / qp, "max"))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_calibrate(bits):
    """Every step is set from what reaches it; BatchNorm's statistics and the mode stay as they were."""
    model = network(quantizer="lsq", bitW=bits).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seen: dict[str, Tensor] = {}
    for name, quant in fake_quants(model):
        quant.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, args[0].detach().clone()))
    calibrate_network(model, torch.randn(8, 3, 16, 16))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()) and not model.training
    assert len(seen) == 40
    bound: dict[str, str] = {}
    for name, quant in fake_quants(model):
        width = 8 if name.split(".")[0] in ("conv1", "fc") else bits
        if name.endswith("weight_quant"):
            expected, bound[name] = lsq_step(seen[name], 2 ** (width - 1) - 1)
            assert quant.scale().item() == pytest.approx(expected, rel=1e-4), name
        else:
            v, step, qp = seen[name].double().numpy(), quant.scale().item(), 2**width - 1
            errors = [
                np.linalg.norm(np.clip(np.round(v / s), 0, qp) * s - v) / np.linalg.norm(v)
                for s in (step, *np.geomspace(step / 2, step * 2, 80))
            ]
            assert errors[0] < 1.1 * min(errors) + 0.003, name
    assert bound["fc.weight_quant"] == "max"
    if bits == 8:
        assert set(bound.values()) == {"max"}
