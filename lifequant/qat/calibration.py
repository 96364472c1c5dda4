"""Step sizes set from data, layer after layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lifequant.qat.layers import fake_quants, weight_layers
from lifequant.qat.modes import preserve_state
from lifequant.quantizers.base import FakeQuant


@contextmanager
def watching_activations(model: nn.Module, watch) -> Iterator[None]:
    """Inside, ``watch(name, quantizer, input)`` runs before every activation quantizer's forward."""
    handles = []
    for name, quant in fake_quants(model):
        if not name.endswith("weight_quant"):
            handles.append(
                quant.register_forward_pre_hook(lambda module, args, name=name: watch(name, module, args[0]))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Set every step from the weights and one batch ``x``, layer after layer; BatchNorm uses the batch, keeps its state."""
    calibrate_weights(model)
    with preserve_state(model), watching_activations(model, lambda name, quant, value: calibrate_one(quant, value)):
        model(x)


@torch.no_grad()
def calibrate_weights(model: nn.Module) -> None:
    """Set the steps of all weights."""
    for _, layer in weight_layers(model):
        if isinstance(layer.weight_quant, FakeQuant):
            calibrate_one(layer.weight_quant, layer.weight)


def calibrate_one(quant: FakeQuant, x: Tensor) -> None:
    """Set one quantizer's step from ``x`` and note that it has been set."""
    quant.calibrate(x)
    quant.calibrated = True
