"""Additive powers of two (APoT, Li et al., ICLR 2020): levels that are sums of powers of two, denser near zero."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from lifequant.quantizers.base import STEP_FLOOR, FakeQuant, Quantizer, positive, standardize
from lifequant.quantizers.first_steps import high_quantile, widened
from lifequant.registry import register

FEW = 16  # levels


def powers_of_two(bits: int) -> list[float]:
    """The 2^bits levels of a magnitude, sorted, from 0 to 1 (sec. 2.2, with base bit-width k = 2).

    n = bits // 2 terms have two bits each, {0, 2^-e, 2^-e', 2^-e''}, and where bits is odd one more has one; no exponent
    occurs twice, so all sums differ.
    """
    n, odd = divmod(bits, 2)
    terms = [[0, 2**-j, 2 ** -(n + j), 2 ** -(2 * n + odd + j)] for j in range(1, n + 1)]
    terms += [[0, 2 ** -(2 * n + 1)]] * odd
    sums = sorted(map(sum, itertools.product(*terms)))
    return [value / sums[-1] for value in sums]


class APoT(FakeQuant):
    """Projection of z / a on the levels, times a. A code is a level's index in the table, and 0 is the level zero.

    da = sum dy * {sign z where clipped, else q - z / a}, q the level (sec. 2.3). As z, and what of dy reaches x, weights
    and activations differ.
    """

    tables = ("levels", "middles")

    def __init__(self, bits: int, levels: list[float], zero: int, alpha: float, channels: int | None = None) -> None:
        super().__init__(bits, -zero, len(levels) - 1 - zero)
        self.channels, self.zero = channels, zero
        self.alpha = nn.Parameter(torch.full(() if channels is None else (channels,), alpha))
        middles = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("middles", torch.tensor(middles), persistent=False)
        # the same, as constants of a compiled step
        self.values, self.between = self.levels.tolist(), self.middles.tolist()

    def fractional_code(self, t: Tensor) -> Tensor:
        """Real-valued code of ``t``, linear between levels and beyond the last: halfway between two is the code + 1/2."""
        t = t.detach().contiguous()
        low = torch.bucketize(t, self.levels[1:-1], right=True)
        return low + (t - self.levels[low]) / (self.levels[low + 1] - self.levels[low]) - self.zero

    def nearest(self, t: Tensor) -> Tensor:
        """int64 indices of the levels nearest to ``t``, from 0 on: the rounded ``fractional_code``, in one look-up."""
        return torch.bucketize(t.detach().contiguous(), self.middles)

    def nearest_level(self, t: Tensor) -> Tensor:
        """The level nearest to ``t``, of the same shape. Compiled, a few comparisons are faster than a look-up."""
        if not torch.compiler.is_compiling() or len(self.values) > FEW:
            return self.levels[self.nearest(t)]
        found = torch.full_like(t, self.values[0])
        for middle, value in zip(self.between, self.values[1:], strict=True):
            found = torch.where(t > middle, value, found)
        return found

    def level(self, u: Tensor) -> Tensor:
        """The inverse of ``fractional_code``; a whole code gives its level exactly."""
        u = u.detach() + self.zero
        low = u.floor().clamp(0, len(self.levels) - 2)
        part, low = u - low, low.long()
        return self.levels[low] * (1 - part) + self.levels[low + 1] * part

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        return (self.nearest(self.scaled(self.scaled_input(x))) - self.zero).to(torch.int16)

    def scaled(self, x: Tensor) -> Tensor:
        """t = z / a; that of weights has no gradient but a's."""
        raise NotImplementedError

    def to_codes(self, x: Tensor) -> Tensor:
        return self.fractional_code(self.scaled(x))

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return self.level(u) * self.broadcast_channels(positive(self.alpha), x)

    def project(self, t: Tensor) -> Tensor:
        """The level nearest to ``t``, with the gradient of ``t`` clipped; ``t`` itself while ``rounding`` is False."""
        if not self.rounding:
            return t
        clipped = t.clamp(-1 if self.zero else 0, 1)
        return (clipped - clipped.detach()) + self.nearest_level(t.detach())  # in this order it stays channels-last

    def scale(self) -> Tensor:
        """The smallest distance between two neighboring values, which is the one beside 0."""
        return positive(self.alpha.detach()) * self.levels[self.zero + 1]


class APoTWeight(APoT):
    """z = (w - mean) / std, both detached (sec. 2.4); levels -a .. a, the magnitude's b - 1 bits with a sign: 2^b - 1 values.

    dw = dy / std, where clipped too. a begins at the paper's 3, or wider where that has less error.
    """

    keeps_range = False

    def __init__(self, bits: int, channels: int | None = None) -> None:
        magnitudes = powers_of_two(bits - 1)
        levels = [-value for value in magnitudes[:0:-1]] + magnitudes
        super().__init__(bits, levels, len(magnitudes) - 1, 3.0, channels)

    def scaled(self, x: Tensor) -> Tensor:
        centered, std = standardize(x.detach(), self.channels)
        return centered / (std * self.broadcast_channels(positive(self.alpha), x))

    def inverse(self, u: Tensor, x: Tensor) -> Tensor:
        centered, std = standardize(x, self.channels)
        return x - centered + std * self.dequantize(u, x)

    def quantize(self, x: Tensor) -> Tensor:
        std = standardize(x.detach(), self.channels)[1]
        return self.broadcast_channels(positive(self.alpha), x) * self.project(self.scaled(x)) + (x - x.detach()) / std

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        centered, std = standardize(x, self.channels)
        rows = self.channel_rows(centered / std, self.channels)

        def error(reach: Tensor) -> Tensor:
            return (self.levels[self.nearest(rows / reach[:, None])] * reach[:, None] - rows).square().mean(1)

        self.alpha.copy_(widened(rows.new_full((len(rows),), 3.0), rows.abs().amax(1), error).view_as(self.alpha))


class APoTActivation(APoT):
    """z = x after a ReLU; levels 0 .. a, 2^b values. dx = dy below a.

    a begins at a high quantile of the data, not at the paper's 8: at 2 bits that loses a third of the power behind a
    BatchNorm (squared error 0.33 of the half-normal's, 0.05 at best), at 3 bits 0.053 (0.013).
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits, powers_of_two(bits), 0, 8.0)

    def scaled(self, x: Tensor) -> Tensor:
        return x / positive(self.alpha)

    def quantize(self, x: Tensor) -> Tensor:
        return positive(self.alpha) * self.project(self.scaled(x))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        self.alpha.copy_(high_quantile(x).clamp(min=STEP_FLOOR / self.levels[1]))


@register("quantizer", "apot")
class APoTQuantizer(Quantizer):
    help = "levels that are sums of powers of two, with a learned clipping level (APoT, Li et al., ICLR 2020)"
    weight_type = APoTWeight
    act_type = APoTActivation
