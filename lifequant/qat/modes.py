"""A model's modes and buffers, for a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lifequant.qat.layers import fake_quants


@contextmanager
def preserve_state(model: nn.Module, train: bool = True) -> Iterator[None]:
    """Inside, the model is in train mode (or as it is) without dropout; afterwards modes and buffers are as before.

    A model in train mode keeps the mode of each of its modules, so that a frozen BatchNorm is one here, too. The buffers
    of quantizers alone stay as they are then, for a calibration sets them.
    """
    modes = [(module, module.training) for module in model.modules()]
    own = {id(buffer) for _, quant in fake_quants(model) for buffer in quant.buffers()}
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if id(buffer) not in own}
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
                if name in kept:
                    buffer.copy_(kept[name])
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
