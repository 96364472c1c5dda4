"""How many bytes a network takes at its bit-widths."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lifequant.qat.layers import QuantConv2d, QuantLinear, weight_layers
from lifequant.quantizers.base import FakeQuant


def packed_bytes(layer: QuantConv2d | QuantLinear) -> int:
    """Bytes of a layer's weights at their bit-width, and of their scales in float32.

    A quantizer that exceeds its bits is counted with the bits that its codes need.
    """
    quant = layer.weight_quant
    if not isinstance(quant, FakeQuant):
        return 4 * layer.weight.numel()
    bits = quant.bits
    if quant.exceeds_bits:
        codes = quant.codes(layer.weight)
        bits = int(codes.max() - codes.min()).bit_length()
    return -(-layer.weight.numel() * bits // 8) + 4 * quant.scale().numel()


def packed_model_bytes(model: nn.Module) -> int:
    """Bytes of a model: weights at their bit-width, and everything else (BatchNorm, biases, scales) in float32."""
    layers = [layer for _, layer in weight_layers(model)]
    packed = {id(layer.weight) for layer in layers} | {
        id(p) for layer in layers for p in layer.weight_quant.parameters()
    }
    rest: Iterable[Tensor] = [p for p in model.parameters() if id(p) not in packed]
    buffers = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return sum(packed_bytes(layer) for layer in layers) + 4 * sum(t.numel() for t in [*rest, *buffers])
