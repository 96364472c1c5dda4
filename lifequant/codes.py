"""Which integer codes a network really uses, and how many bytes it takes at its bit-widths."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lifequant.quantizers.base import FakeQuant
from lifequant.quantizers.layers import packed_bytes, watching_activations, weight_layers


def code_counts(model: nn.Module, x: Tensor) -> dict[str, tuple[FakeQuant, Tensor]]:
    """{tensor: (its quantizer, images of each code from qn to qp)}, weights and activations (on images x)."""
    counts: dict[str, tuple[FakeQuant, Tensor]] = {}

    def count(name: str, quant: FakeQuant, value: Tensor) -> None:
        values, times = quant.codes(value).unique(return_counts=True)
        dense = torch.zeros(max(quant.qp, values.max().item()) - quant.qn + 1, dtype=torch.int64, device=value.device)
        dense[values.long() - quant.qn] = times
        counts[name] = quant, dense

    for name, layer in weight_layers(model):
        if isinstance(layer.weight_quant, FakeQuant):
            count(f"{name}.weight_quant", layer.weight_quant, layer.weight)
    training = model.training
    model.eval()
    with torch.no_grad(), watching_activations(model, count):
        model(x)
    model.train(training)
    return counts


def packed_model_bytes(model: nn.Module) -> int:
    """Weights at their bit-width; all else (BatchNorm, biases, steps) as float32."""
    layers = [layer for _, layer in weight_layers(model)]
    inside = {id(layer.weight) for layer in layers} | {
        id(p) for layer in layers for p in layer.weight_quant.parameters()
    }
    rest: Iterable[Tensor] = [p for p in model.parameters() if id(p) not in inside]
    buffers = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return sum(packed_bytes(layer) for layer in layers) + 4 * sum(t.numel() for t in [*rest, *buffers])
