"""A small quantized network with a task of its own, and its Fisher information by a loop over single images."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant import registry
from lifequant.data.task import Task
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.layers import Scheme
from support.small_net import SmallNet

CONVS = ("conv1", "conv2")


def network(quantizer: str = "proxq", bits: int = 4, per_channel: bool = False) -> SmallNet:
    """With BatchNorm statistics that are not those of a new network."""
    torch.manual_seed(0)
    family = registry.quantizer(quantizer)
    model = SmallNet(Scheme(family, family, bits, bits, per_channel=per_channel))
    x = torch.randn(16, 3, 8, 8)
    calibrate_network(model, x)
    model.train()(x)
    return model


def make_task(place: int = 1, stored: int = 12, warnings: list[str] | None = None) -> Task:
    """Images 0..29 of the classes 0, 1, 2 were task 0 (10 each); 30..49 of the classes 2 and 3 are task 1."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([i % 3 for i in range(30)] + [2 + i % 2 for i in range(20)])
    former, now = torch.arange(30), torch.arange(30, 50)
    none = torch.tensor([], dtype=torch.int64)
    if place == 0:
        return Task(0, [0, 1, 2], images, labels, former, none, none, 5, 8)
    warn = (warnings if warnings is not None else []).append
    return Task(1, [2, 3], images, labels, now, former[:stored], former, 5, 8, stored, warn)


def gradients_at_quantized(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """d CE / d w^q in eval mode, read at the quantizers' outputs."""
    model = copy.deepcopy(model).eval()
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            out.retain_grad()
            outputs[name] = out

        return hook

    for name in CONVS:
        model.get_submodule(name).weight_quant.register_forward_hook(keep(name))
    F.cross_entropy(model(x), y).backward()
    return {name: out.grad.double() for name, out in outputs.items()}


def fisher_by_loop(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    squares = [gradients_at_quantized(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    return {name: np.mean([s[name].numpy() ** 2 for s in squares], axis=0) for name in CONVS}
