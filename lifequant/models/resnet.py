"""ResNet for 32x32 images (He et al., CVPR 2016, sec. 4.2), quantized: 3 stages of n blocks, depth 6n + 2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lifequant.qat.layers import Scheme
from lifequant.registry import register


class Shortcut(nn.Module):
    """Option A: subsample and pad the channels with zeros, no weights. ``conv``: a quantized 1x1 convolution and BatchNorm."""

    def __init__(self, cin: int, cout: int, stride: int, scheme: Scheme, kind: str) -> None:
        super().__init__()
        self.stride, self.pad = stride, cout - cin
        if kind == "conv" and self.pad:
            self.conv, self.bn = scheme.conv(cin, cout, 1, stride), nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "conv"):
            return self.bn(self.conv(x))
        if not self.pad:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))


class Block(nn.Module):
    """Two 3x3 convolutions. The sum of branch and shortcut is requantized by the ReLU's quantizer behind it."""

    def __init__(self, cin: int, cout: int, stride: int, scheme: Scheme, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = scheme.conv(cin, cout, 3, stride), nn.BatchNorm2d(cout), scheme.relu()
        self.conv2, self.bn2, self.relu2 = scheme.conv(cout, cout, 3), nn.BatchNorm2d(cout), scheme.relu()
        self.shortcut = Shortcut(cin, cout, stride, scheme, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """x: float32 [N, 3, H, W], normalized images -> logits [N, num_classes]. ``width`` multiplies all channels."""

    def __init__(self, depth: int, num_classes: int, scheme: Scheme, shortcut: str = "A", width: int = 1) -> None:
        super().__init__()
        c = 16 * width
        self.conv1, self.bn1, self.relu = scheme.conv(3, c, 3, edge=True), nn.BatchNorm2d(c), scheme.relu()
        for stage, (cin, cout) in enumerate(((c, c), (c, 2 * c), (2 * c, 4 * c)), start=1):
            blocks = [Block(cin, cout, 1 + (stage > 1), scheme, shortcut)]
            blocks += [Block(cout, cout, 1, scheme, shortcut) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = scheme.linear(4 * c, num_classes, edge=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


@register("model", "resnet20")
def resnet20(num_classes: int, scheme: Scheme, shortcut: str = "A") -> ResNet:
    """ResNet-20, 0.27 M parameters."""
    return ResNet(20, num_classes, scheme, shortcut)


@register("model", "resnet56")
def resnet56(num_classes: int, scheme: Scheme, shortcut: str = "A") -> ResNet:
    """ResNet-56, 0.85 M parameters."""
    return ResNet(56, num_classes, scheme, shortcut)
