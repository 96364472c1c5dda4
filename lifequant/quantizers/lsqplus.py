"""LSQ+ (Bhalgat et al., CVPR workshops 2020): activations with a learned offset beside the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lifequant.quantizers.base import STEP_FLOOR, Quantizer, sample, scale_gradient
from lifequant.quantizers.lsq import LSQActivation, LSQWeight
from lifequant.registry import register

RANGES, ROUNDS = 16, 12  # of the search for activations' step and offset


class LSQPlusWeight(LSQWeight):
    """As lsq; initial step max |mean +- 3 std| / 2^(b-1), which outliers do not widen."""

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        rows = self.channel_rows(x, self.channels).double()
        reach = rows.mean(1).abs() + 3 * rows.std(1, correction=0)
        self.step_size.copy_((reach / 2 ** (self.bits - 1)).clamp(min=STEP_FLOOR).view_as(self.step_size))


class LSQPlusActivation(LSQActivation):
    """x_q = s * round(clamp((x - b) / s, 0, qp)) + b, codes 0 .. 2^b-1; u = (x - b) / s.

    ds = g * sum dy * {0, qp, round(u) - u}, db = g * sum dy over clipped values, g as lsq's.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.offset = nn.Parameter(torch.zeros(()))

    def _offset(self, x: Tensor) -> Tensor:
        return scale_gradient(self.offset, 1 / math.sqrt(self.features(x) * self.qp))

    def to_codes(self, x: Tensor) -> Tensor:
        return (x - self._offset(x)) / self._scaled(x)

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return u * self._scaled(x) + self._offset(x)

    def scale_parameters(self) -> list[nn.Parameter]:
        return [self.step_size]  # the offset may have either sign

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        size, offset = least_error(sample(x), self.qp)
        self.step_size.fill_(max(size, STEP_FLOOR))
        self.offset.fill_(offset)


def least_error(values: Tensor, qp: int) -> tuple[float, float]:
    """(s, b) with a small mean squared error of s * clamp(round((v - b) / s), 0, qp) + b on ``values`` [N].

    From each of a few ranges: codes for (s, b), then the line (s, b) of least squares through (code, value), in turns;
    neither turn can increase the error.
    """
    low, high = values.min().double(), values.max().double()
    width = high - low
    if width == 0:
        return 0.0, low.item()
    v = (values.double() - low) / width  # in [0, 1], whatever the unit
    s = torch.linspace(1 / RANGES, 1, RANGES, dtype=v.dtype, device=v.device)[:, None] / qp
    b = torch.zeros_like(s)
    for _ in range(ROUNDS):
        q = ((v - b) / s).round().clamp(0, qp)
        centered = q - q.mean(1, keepdim=True)
        spread = centered.square().sum(1, keepdim=True)
        s = torch.where(spread > 0, (centered * v).sum(1, keepdim=True) / spread, s)  # one code alone says nothing of s
        b = (v - s * q).mean(1, keepdim=True)
    error = (s * ((v - b) / s).round().clamp(0, qp) + b - v).square().mean(1)
    best = error.argmin()
    return (s[best] * width).item(), (b[best] * width + low).item()


@register("quantizer", "lsqplus")
class LSQPlusQuantizer(Quantizer):
    help = "lsq with a learned offset of activations (LSQ+, Bhalgat et al., CVPRW 2020)"
    weight_type = LSQPlusWeight
    act_type = LSQPlusActivation
