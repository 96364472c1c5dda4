"""The moving average of the weights, against a loop in numpy."""

from __future__ import annotations

import io

import numpy as np
import torch
from support.small_net import small_net
from torch import nn

from lifequant.qat.layers import weight_layers
from lifequant.training.ema import MovingAverage


def shake(model: nn.Module) -> None:
    """Change all that a model holds."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.mul_(1 + 0.2 * torch.rand_like(value)).add_(0.01 * torch.randn_like(value))
            else:
                value.add_(3)


def test_average_against_a_loop():
    """Floats are averaged, the quantizers' among them; integers are the model's own."""
    model = small_net()
    ema = MovingAverage(model, 0.9)
    expected: dict[str, np.ndarray] = {}
    for step in range(12):
        shake(model)
        ema.update()
        for name, value in model.state_dict().items():
            now = value.double().numpy()
            first = step == 0 or not value.is_floating_point()
            expected[name] = now if first else 0.9 * expected[name] + 0.1 * now
    found = ema.averaged_state()
    assert found.keys() == model.state_dict().keys()
    for name, value in found.items():
        np.testing.assert_allclose(value.double().numpy(), expected[name], rtol=1e-5, atol=1e-6)
    assert ema.nbytes() == sum(v.numel() * v.element_size() for v in model.state_dict().values())
    found["conv1.weight"].zero_()  # a copy
    assert ema.averaged_state()["conv1.weight"].any()


def test_an_averaged_network_has_its_bits():
    """The averaged latent weights are quantized anew: at most 2^b values a tensor, at 2 bits as at the 8 of the edges."""
    model = small_net(bits=2)
    ema = MovingAverage(model, 0.7)
    for _ in range(5):
        shake(model)
        ema.update()
    other = small_net(bits=2)
    other.load_state_dict(ema.averaged_state())
    for _, layer in weight_layers(other):
        assert len(layer.weight_quant(layer.weight).unique()) <= 2**layer.weight_quant.bits
    assert len(other.conv2.weight.unique()) > 4


def test_a_resumed_average_goes_on_bit_for_bit():
    model = small_net()
    ema = MovingAverage(model, 0.9)
    for _ in range(3):
        shake(model)
        ema.update()
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = MovingAverage(model, 0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        shake(model)
        ema.update()
        other.update()
    states = ema.averaged_state(), other.averaged_state()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["conv1.weight"], model.conv1.weight)
