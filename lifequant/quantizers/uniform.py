"""What LifeQuant's authors published as its quantizer. NOT b-bit: its codes are not clamped."""

from __future__ import annotations

import torch
from torch import Tensor

from lifequant.quantizers.base import FakeQuant, Quantizer, round_ste, standardize
from lifequant.quantizers.lsq import LSQActivation
from lifequant.registry import register


class UniformWeight(FakeQuant):
    """w_q = Q_k((w - mean) / std / 2), Q_k(x) = round(x n) / n, n = 2^b - 1, NOT clamped.

    Gaussian weights take about 60 codes at "4 bits" and 13 at "2". qn and qp are what b bits would allow; codes go
    beyond. The gradient is straight through the rounding, true through mean and std; nothing is learned or calibrated.
    """

    exceeds_bits = True
    keeps_range = False

    def __init__(self, bits: int, channels: int | None = None) -> None:
        super().__init__(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        self.channels = channels
        self.levels = 2**bits - 1
        scale = torch.full(() if channels is None else (channels,), 1 / self.levels)
        self.register_buffer("fixed_scale", scale, persistent=False)

    def to_codes(self, x: Tensor) -> Tensor:
        centered, std = standardize(x, self.channels)
        return centered / std * (self.levels / 2)

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return u / self.levels

    def inverse(self, u: Tensor, x: Tensor) -> Tensor:
        centered, std = standardize(x, self.channels)
        return x - centered + std * (2 / self.levels) * u

    def quantize(self, x: Tensor) -> Tensor:
        u = self.to_codes(x)
        return self.dequantize(round_ste(u) if self.rounding else u, x)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """int32, for an outlier of a large tensor goes far; not within qn .. qp."""
        return self.to_codes(self.scaled_input(x)).round().to(torch.int32)

    def scale(self) -> Tensor:
        return self.fixed_scale

    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)


@register("quantizer", "uniform")
class UniformQuantizer(Quantizer):
    help = "NOT b-bit: the published code's unclamped codes, about 60 at 4 bits and 13 at 2; activations as lsq (our choice)"
    exceeds_bits = True
    weight_type = UniformWeight
    act_type = LSQActivation
