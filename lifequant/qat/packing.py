"""How many bytes a network takes at its bit-widths."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lifequant.qat.layers import QuantConv2d, QuantLinear, weight_layers
from lifequant.quantizers.base import FakeQuant


def packed_bytes(layer: QuantConv2d | QuantLinear) -> int:
    """Bytes of the layer's weights at their bit-width, or at that which their codes need, the steps (float32) included."""
    quant = layer.weight_quant
    if not isinstance(quant, FakeQuant):
        return 4 * layer.weight.numel()
    bits = quant.bits
    if quant.exceeds_bits:
        codes = quant.codes(layer.weight)
        bits = int(codes.max() - codes.min()).bit_length()
    return -(-layer.weight.numel() * bits // 8) + 4 * quant.scale().numel()


def packed_model_bytes(model: nn.Module) -> int:
    """Weights at their bit-width; all else (BatchNorm, biases, steps) as float32."""
    layers = [layer for _, layer in weight_layers(model)]
    inside = {id(layer.weight) for layer in layers} | {
        id(p) for layer in layers for p in layer.weight_quant.parameters()
    }
    rest: Iterable[Tensor] = [p for p in model.parameters() if id(p) not in inside]
    buffers = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return sum(packed_bytes(layer) for layer in layers) + 4 * sum(t.numel() for t in [*rest, *buffers])
