"""Change a model's train and eval modes for a while, and restore them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lifequant.qat.layers import fake_quants


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
def preserve_state(model: nn.Module, train: bool = True) -> Iterator[None]:
    """Inside, the model runs without dropout; on exit, its modes and buffers have their former values.

    With ``train``, a model in eval mode is in train mode inside. A model in train mode is not changed, so a BatchNorm that
    was frozen stays frozen. The quantizers' buffers are not restored, because a calibration sets them.
    """
    quantizer_buffers = {id(buffer) for _, quant in fake_quants(model) for buffer in quant.buffers()}
    former = {name: b.clone() for name, b in model.named_buffers() if id(b) not in quantizer_buffers}
    with preserve_modes(model):
        if train and not model.training:
            model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in former:
                        buffer.copy_(former[name])
