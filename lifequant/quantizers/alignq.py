"""AlignQ (Chen et al., CVPR 2022): values pass their cumulative distribution, so that all codes are equally likely."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lifequant.quantizers.base import FakeQuant, Quantizer, standardize
from lifequant.registry import register


class AlignQ(FakeQuant):
    """y = reach * (2 Q_k(Phi(z)) - 1), Q_k(p) = round(p n) / n, n = 2^b - 1: codes 0 .. n, symmetric, without a zero.

    Phi is the standard normal distribution function; z is for a subclass to say. The gradient is straight through the
    rounding and true through Phi; the clamp does nothing. Nothing is learned or calibrated.
    """

    reach = 1.0
    keeps_range = False

    def __init__(self, bits: int, channels: int | None = None) -> None:
        super().__init__(bits, 0, 2**bits - 1)
        self.channels = channels
        scale = torch.full(() if channels is None else (channels,), 2 * self.reach / self.qp)
        self.register_buffer("fixed_scale", scale, persistent=False)

    def to_codes(self, x: Tensor) -> Tensor:
        return self.qp * 0.5 * (1 + torch.erf(self.standard(x) / math.sqrt(2)))

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return self.reach * (2 * u / self.qp - 1)

    def standard(self, x: Tensor) -> Tensor:
        """z, with the shape of ``x``."""
        raise NotImplementedError

    def standard_latent(self, u: Tensor) -> Tensor:
        """z of codes ``u``; the codes at the ends stand for values at infinity and are bounded."""
        bound = 1 - torch.finfo(u.dtype).eps
        return math.sqrt(2) * torch.erfinv((2 * u / self.qp - 1).clamp(-bound, bound))

    def scale(self) -> Tensor:
        return self.fixed_scale

    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)


class AlignQWeight(AlignQ):
    """z = (w - mean) / std; the gradient goes through mean and std."""

    def standard(self, x: Tensor) -> Tensor:
        centered, std = standardize(x, self.channels)
        return centered / std

    def inverse(self, u: Tensor, x: Tensor) -> Tensor:
        centered, std = standardize(x, self.channels)
        return x - centered + std * self.standard_latent(u)


class AlignQActivation(AlignQ):
    """z = x, the output of a BatchNorm, before the ReLU: y = 2 (2 Q_k(Phi(x)) - 1).

    After the ReLU 2^(b-1) positive values and 0 are left. The input of the last layer, a mean of such values, is
    quantized the same way and uses the codes from n/2 on.
    """

    before_relu = True
    reach = 2.0

    def __init__(self, bits: int) -> None:
        super().__init__(bits)

    def standard(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, u: Tensor, x: Tensor) -> Tensor:
        return self.standard_latent(u)


@register("quantizer", "alignq")
class AlignQQuantizer(Quantizer):
    help = "codes equally likely by the normal distribution function, before the ReLU (AlignQ, Chen et al., CVPR 2022)"
    weight_type = AlignQWeight
    act_type = AlignQActivation
