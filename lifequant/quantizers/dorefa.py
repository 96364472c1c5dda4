"""DoReFa-Net (Zhou et al., 2016): nothing is learned, weights are squeezed by tanh, activations clipped to [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from lifequant.quantizers.base import STEP_FLOOR, FakeQuant, Quantizer
from lifequant.registry import register


class DoReFaWeight(FakeQuant):
    """w_q = 2 Q_k(tanh w / (2 max|tanh w|) + 1/2) - 1, Q_k(x) = round(x n) / n, n = 2^b - 1: codes 0 .. n (eq. 9).

    The gradient is straight through the rounding, true through tanh and maximum; the clamp does nothing. The values are odd multiples of 1/n in
    [-1, 1]; there is no zero, and nothing to calibrate.
    """

    keeps_range = False
    straight_to = 1 / 8  # there tanh x is x (1 - 0.005)

    def __init__(self, bits: int, channels: int | None = None) -> None:
        super().__init__(bits, 0, 2**bits - 1)
        self.channels = channels
        scale = torch.full(() if channels is None else (channels,), 2 / self.qp)
        self.register_buffer("fixed_scale", scale, persistent=False)

    def _largest(self, squeezed: Tensor) -> Tensor:
        """max|tanh w|, never 0: weights that all are zero have the middle code."""
        largest = self.channel_rows(squeezed, self.channels).abs().amax(1).clamp(min=STEP_FLOOR)
        return self.broadcast_channels(largest if self.channels else largest[0], squeezed)

    def to_codes(self, x: Tensor) -> Tensor:
        squeezed = x.tanh()
        return self.qp * (squeezed / (2 * self._largest(squeezed)) + 0.5)

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return 2 * u / self.qp - 1

    def inverse(self, u: Tensor, x: Tensor) -> Tensor:
        bound = 1 - torch.finfo(x.dtype).eps  # a code at the end may stand for no finite weight
        return ((2 * u / self.qp - 1) * self._largest(x.tanh())).clamp(-bound, bound).atanh()

    def scale(self) -> Tensor:
        return self.fixed_scale

    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)


class DoReFaActivation(FakeQuant):
    """a_q = Q_k(clamp(a, 0, 1)): codes 0 .. 2^b-1, whatever the data."""

    keeps_range = False

    def __init__(self, bits: int) -> None:
        super().__init__(bits, 0, 2**bits - 1)
        self.register_buffer("fixed_scale", torch.tensor(1 / self.qp), persistent=False)

    def to_codes(self, x: Tensor) -> Tensor:
        return x * self.qp

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return u / self.qp

    def scale(self) -> Tensor:
        return self.fixed_scale

    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)


@register("quantizer", "dorefa")
class DoReFaQuantizer(Quantizer):
    help = "weights through tanh, activations clipped to 0..1, nothing learned (DoReFa-Net, Zhou et al., 2016)"
    weight_type = DoReFaWeight
    act_type = DoReFaActivation
