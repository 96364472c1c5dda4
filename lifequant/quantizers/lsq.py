"""Learned Step Size Quantization (Esser et al., ICLR 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lifequant.quantizers.base import STEP_FLOOR, FakeQuant, Quantizer, positive, scale_gradient
from lifequant.quantizers.first_steps import least_error, sample_with_extremes
from lifequant.registry import register


class LSQ(FakeQuant):
    """v_q = s * round(clamp(v / s, qn, qp)); ds = g * sum dy * {qn, qp, round(v/s) - v/s}, g = 1 / sqrt(N qp) (eq. 1-3).

    N is the number of weights of the tensor, or of features of one image. Initial s of weights = 2 mean|v| / sqrt(qp) (sec. 2.1),
    but at most max|v| / qp: at 8 bits the paper's is so wide that four codes of five lie beyond all values.
    """

    def __init__(self, bits: int, qn: int, qp: int, channels: int | None = None) -> None:
        super().__init__(bits, qn, qp)
        self.channels = channels
        self.step_size = nn.Parameter(torch.ones(() if channels is None else channels))

    def _scaled(self, x: Tensor) -> Tensor:
        return self.broadcast_channels(
            scale_gradient(positive(self.step_size), 1 / math.sqrt(self.features(x) * self.qp)), x
        )

    def features(self, x: Tensor) -> int:
        """N of the gradient's scale: values that share a step; at least 1, since a tensor may be empty."""
        return max(1, x.numel() // (self.channels or 1))

    def to_codes(self, x: Tensor) -> Tensor:
        return x / self._scaled(x)

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return u * self._scaled(x)

    def scale(self) -> Tensor:
        return positive(self.step_size.detach())

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        size = self.channel_rows(x, self.channels).abs()
        size = torch.minimum(2 * size.mean(1) / math.sqrt(self.qp), size.amax(1) / self.qp)
        self.step_size.copy_(size.clamp(min=STEP_FLOOR).view_as(self.step_size))


class LSQWeight(LSQ):
    """Signed: codes -2^(b-1) .. 2^(b-1)-1."""

    linear = True

    def __init__(self, bits: int, channels: int | None = None) -> None:
        super().__init__(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, channels)


class LSQActivation(LSQ):
    """Unsigned, after a ReLU: codes 0 .. 2^b-1.

    The initial step is that of least squared error (as LSQ+, Bhalgat et al. 2020, sec. 3.3). The paper's supposes that half of
    the values are zero, since its mean is over all of them. Where four of five are, as in many a trained network, it clips
    most of the others: the relative error at 2 bits is 0.7 in place of 0.3.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits, 0, 2**bits - 1)

    def features(self, x: Tensor) -> int:
        return max(1, math.prod(x.shape[1:]))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        self.step_size.fill_(max(least_error(sample_with_extremes(x[x > 0]), self.qn, self.qp)[0], STEP_FLOOR))


@register("quantizer", "lsq")
class LSQQuantizer(Quantizer):
    help = "learned step size (Esser et al., ICLR 2020)"
    weight_type = LSQWeight
    act_type = LSQActivation
