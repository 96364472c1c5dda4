"""LSQ+ (Bhalgat et al., CVPR workshops 2020): activations with a learned offset beside the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lifequant.quantizers.base import STEP_FLOOR, Quantizer, scale_gradient
from lifequant.quantizers.first_steps import least_error, sample, widened
from lifequant.quantizers.lsq import LSQActivation, LSQWeight
from lifequant.registry import register


class LSQPlusWeight(LSQWeight):
    """As lsq; initial step max |mean +- 3 std| / 2^(b-1), which outliers do not widen, or a wider one of less error."""

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        rows, codes = self.channel_rows(x, self.channels).double(), 2 ** (self.bits - 1)

        def error(reach: Tensor) -> Tensor:
            step = (reach / codes).clamp(min=STEP_FLOOR)[:, None]
            return ((rows / step).round().clamp(self.qn, self.qp) * step - rows).square().mean(1)

        reach = widened(rows.mean(1).abs() + 3 * rows.std(1, correction=0), rows.abs().amax(1), error)
        self.step_size.copy_((reach / codes).clamp(min=STEP_FLOOR).view_as(self.step_size))


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
        size, offset = least_error(sample(x), 0, self.qp, offset=True)
        self.step_size.fill_(max(size, STEP_FLOOR))
        self.offset.fill_(offset)


@register("quantizer", "lsqplus")
class LSQPlusQuantizer(Quantizer):
    help = "lsq with a learned offset of activations (LSQ+, Bhalgat et al., CVPRW 2020)"
    weight_type = LSQPlusWeight
    act_type = LSQPlusActivation
