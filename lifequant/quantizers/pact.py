"""PACT (Choi et al., 2018): activations with a learned clipping level; weights as dorefa."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifequant.quantizers.base import STEP_FLOOR, FakeQuant, Quantizer, positive, round_ste
from lifequant.quantizers.dorefa import DoReFaWeight
from lifequant.quantizers.first_steps import high_quantile
from lifequant.registry import register


class PACTActivation(FakeQuant):
    """y = clamp(x, 0, a), y_q = Q_k(y / a) * a, Q_k(v) = round(v n) / n, n = 2^b - 1: codes 0 .. n (eq. 1, 2).

    da = sum dy over x >= a and nothing else, dx = dy below (eq. 3); a is decayed with the weights' L2, which
    holds it down. Initial a: a high quantile of the data; the paper's 10 is far above
    what follows a BatchNorm.
    """

    weight_decay = True

    def __init__(self, bits: int) -> None:
        super().__init__(bits, 0, 2**bits - 1)
        self.alpha = nn.Parameter(torch.tensor(10.0))

    def to_codes(self, x: Tensor) -> Tensor:
        return x / self.scale()

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return u * self.scale()

    def quantize(self, x: Tensor) -> Tensor:
        u = self.to_codes(x)
        if not self.rounding:
            return self.dequantize(u, x)
        clipped = (u >= self.qp).to(u.dtype)
        return self.dequantize(round_ste(u.clamp(self.qn, self.qp)), x) + clipped * (self.alpha - self.alpha.detach())

    def scale(self) -> Tensor:
        return positive(self.alpha.detach()) / self.qp

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        self.alpha.copy_(high_quantile(x).clamp(min=STEP_FLOOR * self.qp))


@register("quantizer", "pact")
class PACTQuantizer(Quantizer):
    help = "activations with a learned clipping level (PACT, Choi et al., 2018), weights as dorefa"
    weight_type = DoReFaWeight
    act_type = PACTActivation
