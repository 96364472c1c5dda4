"""Set the quantizers' scales from data, layer after layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lifequant.qat.layers import fake_quants
from lifequant.qat.modes import preserve_state
from lifequant.qat.weights import weights
from lifequant.quantizers.base import HALF, FakeQuant


@contextmanager
def hook_activations(model: nn.Module, function: Callable[[str, FakeQuant, Tensor], None]) -> Iterator[None]:
    """Inside, ``function(name, quantizer, input)`` runs before the forward pass of every activation quantizer.

    What torch.compile made runs in eager mode inside: it does not look for hooks that came later. Where torch._dynamo is not
    loaded, nothing was compiled, and to load it takes seconds.
    """
    handles = []
    for name, quant in fake_quants(model):
        if not any(part.endswith("weight_quant") for part in name.split(".")):  # which may have another below it
            handles.append(
                quant.register_forward_pre_hook(lambda module, args, name=name: function(name, module, args[0]))
            )
    try:
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate_network(model: nn.Module, x: Tensor) -> None:
    """Set every scale from the weights and from one batch of images ``x``, float [N, 3, H, W].

    Each quantizer sees the output of layers that are quantized already. BatchNorm normalizes by the batch, and its running
    statistics do not change. Raises UserError if a value is not finite.
    """
    calibrate_weights(model)
    with (
        preserve_state(model, train=True),
        hook_activations(model, lambda name, quant, value: calibrate_quantizer(quant, value)),
    ):
        model(x)


@torch.no_grad()
def calibrate_weights(model: nn.Module) -> None:
    """Set the scales of all weights."""
    for weight in weights(model):
        if isinstance(weight.quant, FakeQuant):
            calibrate_quantizer(weight.quant, weight.tensor)


def calibrate_quantizer(quant: FakeQuant, x: Tensor) -> None:
    """Set one quantizer's scale from ``x`` and mark the quantizer as calibrated."""
    quant.calibrate(x.float() if x.dtype in HALF else x)
    quant.calibrated = True


def is_empty(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has tensors and no value in any of them, so that no scale can be set from it."""
    sizes = [t.numel() for t in (*args, *kwargs.values()) if torch.is_tensor(t)]
    return bool(sizes) and not any(sizes)
