"""A small float network and its quantized copy."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lifequant import calibrate, quantize_model


class Net(nn.Module):
    """One ReLU used twice, a ReLU6, a grouped and a dilated convolution with bias and circular padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, padding_mode="circular")
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)
        self.conv3 = nn.Conv2d(8, 6, 1, stride=2, bias=False)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        x = self.relu(self.conv2(x) + x)
        return self.fc(self.drop(self.relu6(self.conv3(x)).mean((2, 3))))


def net(seed: int = 0, **options) -> tuple[Net, nn.Module]:
    torch.manual_seed(seed)
    model = Net()
    return model, quantize_model(model, **{"quantizer": "lsq", **options})


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def bits_of(q: nn.Module) -> dict[str, int]:
    return {name: getattr(quant, "bits", 32) for name, quant in q.named_modules() if name.endswith("_quant")}


def types(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


# Which layers


class Values(TorchFunctionMode):
    """Counts the distinct values of what convolutions and matrix products with weights take."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.conv2d, F.conv_transpose2d, F.linear):
            self.counts.append(len(args[0].unique()))
        assert function is not F.multi_head_attention_forward
        return function(*args, **(kwargs or {}))


def counts(q: nn.Module, *given: Tensor) -> list[int]:
    with Values() as values, torch.no_grad():
        copy.deepcopy(q)(*given)
    return values.counts


def quantized(model: nn.Module, x: Tensor = X, **options) -> nn.Module:
    q = quantize_model(model, **{"quantizer": "lsq", **options})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(q, x)
    return q
