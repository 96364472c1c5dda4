"""Change a model's train and eval modes for a while, and restore them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lifequant.qat.layers import fake_quants

DROPPED = ("StochasticDepth", "DropPath")  # torchvision's and timm's, which drop whole branches


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """On exit, every module is in its former mode (train or eval), also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode. On exit, every module is in its former mode."""
    with preserve_modes(model):
        model.eval()
        yield


@contextmanager
def preserve_state(model: nn.Module, train: bool | None = None) -> Iterator[None]:
    """Inside, the model runs without dropout; on exit, its modes and buffers have their former values.

    ``train``: its mode inside; None is the mode that it is in, so a BatchNorm that was frozen stays frozen. A buffer that the
    model replaces by another one, of whatever size, is the former one again. The quantizers' buffers are not restored,
    because a calibration sets them.
    """
    quantizers = {id(quant) for _, quant in fake_quants(model)}
    former = [
        (module._buffers, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        if id(module) not in quantizers
        for name, buffer in module._buffers.items()
    ]
    with preserve_modes(model):
        if train is not None and train != model.training:
            model.train(train)
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in DROPPED:
                module.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for buffers, name, buffer, value in former:
                    if buffer is not None and 0 not in buffer.stride() and not torch.equal(buffer, value):
                        buffer.copy_(value)
                    buffers[name] = buffer
