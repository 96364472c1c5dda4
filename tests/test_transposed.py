"""Transposed convolutions: their weights are quantized, as torch's own function computes with them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.converted import counts, quantized
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lifequant import calibrate, options, quantize_model, registry
from lifequant.common.errors import UserError
from lifequant.data.task import user_task
from lifequant.qat.layers import QuantConvTranspose2d, weight_layers
from lifequant.qat.packing import packed_model_bytes
from lifequant.qat.refit import relative_error
from lifequant.qat.weights import quantized_weights

FORMS = [
    {}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 2, "bias": False}, {"dilation": 2, "stride": (1, 3)},
]  # fmt: skip


class UNet(nn.Module):
    """Down, up by a transposed convolution of a size that is asked for, and beside what was before."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, groups=groups), nn.Conv2d(16, 5, 1)
        self.relu, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        up = self.up(self.relu2(self.down(x)), output_size=x.shape[2:])
        return self.last(torch.cat([x, up], 1))


X = torch.randn(4, 3, 9, 12, generator=torch.Generator().manual_seed(0))


def network(**options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = UNet(options.pop("groups", 1))
    return model, quantized(model, X, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_as_the_float_layer_with_the_quantized_weights(name, form):
    """In float64, with few values in the weight, and the gradients that the float layer has at these weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, **form)).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    q = quantize_model(model, name, 4, 32, first_last_bits=None, per_channel=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # alignq's error is out of proportion
        calibrate(q, x)
    weight = q[0].weight_quant(q[0].weight)
    assert type(q[0]) is QuantConvTranspose2d and weight.shape == model[0].weight.shape
    assert len(weight.unique()) <= (256 if name == "uniform" else 16) and q[0].weight_quant.scale().numel() == 1
    twin = copy.deepcopy(model)
    twin[0].weight.data.copy_(weight.detach())
    out, expected = q(x), twin(x)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert q[0].bias is None or torch.equal(q[0].bias.grad, twin[0].bias.grad)
    if name == "lsq":  # straight through where nothing is clipped
        codes = q[0].weight_quant.to_codes(q[0].weight)
        inside = (codes > -8) & (codes < 7)
        torch.testing.assert_close(q[0].weight.grad[inside], twin[0].weight.grad[inside])
        assert inside.float().mean() > 0.8


def test_report_and_errors():
    model, q = network(weight_bits=3)
    assert q.quantization.swapped["up"] == "ConvTranspose2d, 3-bit weights (LSQWeight)" and not q.quantization.left
    error = (q.up.weight_quant(q.up.weight) - model.up.weight).norm() / model.up.weight.norm()
    assert q.quantization.errors["up"] == pytest.approx(error.item(), rel=1e-5) and 0.1 < error < 0.3
    assert q.quantization.errors["up"] == relative_error(q.up.weight_quant, q.up.weight)
    assert [name for name, _ in weight_layers(q)] == ["first", "down", "up", "last"]
    assert torch.equal(quantized_weights(q)["up"], q.up.weight_quant(q.up.weight))
    assert max(counts(q, X)[1:]) <= 16
    saved = packed_model_bytes(network(weight_bits=3, layer_bits={"up": (32, 4)})[1]) - packed_model_bytes(q)
    assert saved == 4 * q.up.weight.numel() - (3 * q.up.weight.numel() / 8 + 4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("inputs", ["all", "relu"])
def test_eight_bits_are_near_the_float_model(groups, inputs):
    for per_channel in (False, True):
        torch.manual_seed(0)
        model = UNet(groups)
        q = quantize_model(model, weight_bits=8, act_bits=8, per_channel=per_channel, inputs=inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if inputs == "relu" else "error")  # the image, and cat's two halves
            calibrate(q, X)
        assert 0 < (q(X) - model(X)).norm() / model(X).norm() < 0.03
        assert len(q.up.weight_quant(q.up.weight).unique()) <= 256


def test_bits():
    """The first and the last of a generator, a layer's own, 32 bits, constant weights, and back to torch's layers."""
    torch.manual_seed(0)
    layers = [
        nn.ConvTranspose2d(4, 4, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2),
    ]
    model = nn.Sequential(*layers)
    q = quantize_model(model, weight_bits=3)
    assert [layer.weight_quant.bits for _, layer in weight_layers(q)] == [8, 3, 8]
    q = quantize_model(model, layer_bits={"2": (2, 6), "4": 32})
    assert (q[2].weight_quant.bits, type(q[4].weight_quant)) == (2, nn.Identity)
    assert q.quantization.left == {"4": "ConvTranspose2d, 32 bits"}
    whole = quantize_model(model, "lsq", 32, 32, 32)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(whole(x), model(x)) and not whole.quantization.swapped
    again = quantize_model(whole, first_last_bits=None)
    assert [layer.weight_quant.bits for _, layer in weight_layers(again)] == [4, 4, 4]
    nn.init.constant_(model[2].weight, 0.25)
    q = quantize_model(model, layer_bits={"*": 4})
    assert (
        q.quantization.left == {"2": "ConvTranspose2d, its weights are all alike"} and "2" not in q.quantization.swapped
    )
    assert torch.equal(q[2].weight_quant(q[2].weight), model[2].weight)


def test_what_stays_float():
    class Own(nn.ConvTranspose2d):
        pass

    normed = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(4, 4, 2))
    tied = nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2)
    tied[0].weight = tied[1].weight
    q = quantize_model(nn.Sequential(Own(4, 4, 2), normed, *tied, nn.ConvTranspose1d(4, 4, 2), nn.Linear(4, 4)))
    assert q.quantization.left == {
        "0": "Own, a subclass of ConvTranspose2d",
        "1": "ConvTranspose2d whose weight is parametrized",
        "2": "ConvTranspose2d that shares its weight with '3'",
        "3": "ConvTranspose2d that shares its weight with '2'",
        "4": "ConvTranspose1d, its weight",
    }


@pytest.mark.parametrize("name", ["lsq", "proxq", "dorefa"])
def test_states(name):
    """The float model's and its own load strictly. That of a former version has no such scale, which is then set alone."""
    model, q = network(quantizer=name)
    with torch.no_grad():
        for p in q.parameters():
            p.mul_(1.01)  # as if trained: nothing is what calibration gives
    state = q.state_dict()
    twin = quantize_model(model, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(twin.load_state_dict(state))
    assert torch.equal(twin(X), q(X))
    former = {key: value for key, value in state.items() if not key.startswith("up.weight_quant.")}
    other = quantize_model(model, name)
    with pytest.warns(UserWarning, match="no scale for the weights of 1 ConvTranspose2d"):
        assert not any(other.load_state_dict(former))
    now = other.state_dict()
    assert all(torch.equal(now[key], value) for key, value in former.items())
    fresh = registry.quantizer(name).weight(4)
    fresh.prepare_to_convert(of_weight=True)
    fresh.calibrate(q.up.weight)
    torch.testing.assert_close(other.up.weight_quant.scale(), fresh.scale())
    assert relative_error(other.up.weight_quant, q.up.weight) < 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(X)
        assert not any(other.load_state_dict(model.state_dict()))
    assert not other.up.weight_quant.calibrated


def test_torchs_folding_is_refused():
    q = quantized(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), X).eval()
    with pytest.raises(UserError, match=r"use lifequant.fold_batchnorm\(q\)"):
        fuse_conv_bn_eval(q[0], q[1], transpose=True)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.fc = UNet(), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x).mean((2, 3)))


@pytest.mark.parametrize("penalty", ["proxq", "proxq_paper", "proxq_published", "proxq_step"])
def test_penalties_hold_its_weights(penalty):
    q = quantized(Classifier(), X)
    config = options.make(method="ours", penalty=penalty)
    guard, labels = registry.penalty(penalty)(config), torch.arange(8) % 4
    images = torch.randn(8, 3, 8, 8)
    guard.begin_task(q, user_task(0, images[:4], labels[:4] % 2, num_classes=4, batch_size=4))
    rest = torch.arange(8) % 2  # more than are stored
    task = user_task(1, images[:4], labels[:4] % 2 + 2, images[4:], rest[:4], rest, num_classes=4, batch_size=4)
    guard.begin_task(q, task)
    found = guard.importance["net.up.weight" if penalty == "proxq_published" else "net.up"]
    assert found.shape == q.net.up.weight.shape and found.any()


def test_trains():
    _, q = network()
    optimizer = torch.optim.SGD(q.parameters(), 0.1)
    y = (X[:, 0] > 0).long()
    losses = []
    for _ in range(50):
        loss = F.cross_entropy(q(X), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and q.up.weight_quant.step_size.grad.any()
