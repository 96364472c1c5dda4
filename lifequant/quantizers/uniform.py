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
    beyond. The gradient is straight through the rounding, true through mean and std; nothing is learnt or calibrated.
    """

    exceeds_bits = True

    def __init__(self, bits: int, channels: int | None = None) -> None:
        super().__init__(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        self.channels = channels
        self.parts = 2**bits - 1
        distance = torch.full(() if channels is None else (channels,), 1 / self.parts)
        self.register_buffer("distance", distance, persistent=False)

    def into_codes(self, x: Tensor) -> Tensor:
        centred, std = standardize(x, self.channels)
        return centred / std * (self.parts / 2)

    def from_codes(self, u: Tensor, x: Tensor) -> Tensor:
        return u / self.parts

    def latent(self, u: Tensor, x: Tensor) -> Tensor:
        centred, std = standardize(x, self.channels)
        return x - centred + std * (2 / self.parts) * u

    def forward(self, x: Tensor) -> Tensor:
        u = self.into_codes(x)
        return self.from_codes(round_ste(u) if self.rounding else u, x)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """int32, for an outlier of a large tensor goes far; not within qn .. qp."""
        return self.into_codes(x).round().to(torch.int32)

    def step(self) -> Tensor:
        return self.distance

    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)


@register("quantizer", "uniform")
class UniformQuantizer(Quantizer):
    help = "NOT b-bit: the published code's unclamped codes, about 60 at 4 bits and 13 at 2; activations as lsq (our choice)"
    exceeds_bits = True
    weight_type = UniformWeight
    act_type = LSQActivation
