"""A network of two convolutions, quantized, for what needs no ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifequant import registry
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.layers import Scheme


class SmallNet(nn.Module):
    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = scheme.conv(3, 4, 3, edge=True), nn.BatchNorm2d(4), scheme.relu()
        self.conv2, self.bn2, self.relu2 = scheme.conv(4, 6, 3, stride=2), nn.BatchNorm2d(6), scheme.relu()
        self.fc = scheme.linear(6, 5, edge=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def small_net(name: str = "lsq", bits: int = 4, per_channel: bool = False) -> SmallNet:
    """Calibrated, with activations of 4 bits."""
    torch.manual_seed(0)
    family = registry.quantizer(name)
    model = SmallNet(Scheme(family, family, weight_bits=bits, per_channel=per_channel))
    if bits != 32:
        calibrate_network(model, torch.randn(8, 3, 8, 8))
    return model
