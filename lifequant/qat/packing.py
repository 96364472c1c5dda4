"""How many bytes a network takes at its bit-widths, and weights as integer codes: a stream of bits, a layer that holds them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from lifequant.qat.weights import weights
from lifequant.quantizers.base import FakeQuant


def packed_bytes(quant: nn.Module, weight: Tensor) -> int:
    """Bytes of a weight at its bit-width, and of its scales in float32.

    A quantizer that exceeds its bits is counted with the bits that its codes need.
    """
    if not isinstance(quant, FakeQuant):
        return 4 * weight.numel()
    bits, _ = bits_and_first(quant, quant.codes(weight) if quant.exceeds_bits else None)
    return -(-weight.numel() * bits // 8) + 4 * quant.scale().numel()


def packed_model_bytes(model: nn.Module) -> int:
    """Bytes of a model: weights at their bit-width, and everything else (BatchNorm, biases, scales) in float32."""
    quantized = [(weight.quant, weight.tensor) for weight in weights(model)]
    packed = {id(weight) for _, weight in quantized} | {id(p) for quant, _ in quantized for p in quant.parameters()}
    rest: Iterable[Tensor] = [p for p in model.parameters() if id(p) not in packed]
    buffers = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return sum(packed_bytes(*pair) for pair in quantized) + 4 * sum(t.numel() for t in [*rest, *buffers])


def bits_and_first(quant: FakeQuant, codes: Tensor | None) -> tuple[int, int]:
    """(bits a code, the code that is stored as 0): the quantizer's own, or, where it exceeds its bits, what ``codes`` need."""
    if not quant.exceeds_bits:
        return quant.bits, quant.qn
    least, most = (int(bound) for bound in codes.aminmax())
    return (most - least).bit_length(), least


def pack_codes(codes: Tensor, bits: int, first: int) -> Tensor:
    """Integer codes of any shape, each from ``first`` to ``first`` + 2^bits - 1 -> uint8 [ceil(N bits / 8)].

    Code i (in row-major order), less ``first``, is bits i * bits to (i + 1) * bits - 1 of the stream, the lowest one first.
    Bit k of the stream is bit k % 8 of byte k // 8, where bit 0 has the value 1. The last byte is filled with zeros.
    """
    values = (codes.detach().cpu().numpy().astype(np.int64).ravel() - first).astype("<u4")
    each = np.unpackbits(values.view(np.uint8).reshape(-1, 4), axis=1, count=bits, bitorder="little")  # [N, bits]
    return torch.from_numpy(np.packbits(each, bitorder="little"))


def unpack_codes(stream: Tensor, bits: int, first: int, count: int) -> Tensor:
    """The inverse of ``pack_codes``: int64 [count]. ``bits`` is at most 31, ``stream`` has ceil(count bits / 8) bytes."""
    each = np.unpackbits(stream.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    values = np.zeros((count, 4), np.uint8)
    values[:, : -(-bits // 8)] = np.packbits(each, axis=1, bitorder="little")
    return torch.from_numpy(values.view("<u4")[:, 0].astype(np.int64)) + first


class PackedWeight(FakeQuant):
    """Integer codes in place of a float weight: whatever weight it is given, it returns the values of its codes.

    ``quant`` is the quantizer that the codes are of; it says what they stand for. The weight can't be trained any more, and
    ``no_rounding``, ``calibrate`` and what ``quant.of_codes`` names change nothing.
    """

    def __init__(self, quant: FakeQuant, codes: Tensor, weight: Tensor) -> None:
        """``codes``: integers, as many as ``weight`` has values. They lie in memory as it does, on which the result of a
        convolution depends."""
        super().__init__(quant.bits, quant.qn, quant.qp)
        self.quant, self.of_codes, self.channels = quant, quant.of_codes, getattr(quant, "channels", None)
        self.exceeds_bits, self.linear = quant.exceeds_bits, quant.linear
        stored = torch.empty_like(weight, dtype=torch.int32 if quant.exceeds_bits else torch.int16, requires_grad=False)
        self.register_buffer("stored", stored.copy_(codes.view(weight.shape)))
        self.calibrated = True

    def quantize(self, x: Tensor) -> Tensor:
        return self.dequantize(self.to_codes(x), x)

    def codes(self, x: Tensor) -> Tensor:
        return self.stored

    def to_codes(self, x: Tensor) -> Tensor:
        return self.stored.to(x.dtype)

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return self.quant.dequantize(u, x)

    def inverse(self, u: Tensor, x: Tensor) -> Tensor:
        return self.quant.inverse(u, x)

    def scale(self) -> Tensor:
        return self.quant.scale()

    def calibrate(self, x: Tensor) -> None:
        """Nothing: the codes have their scale."""
