"""Linear symmetric quantization with a simulated gradient of the step (LLSQ, Zhao et al., ICLR 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lifequant.quantizers.base import STEP_FLOOR, FakeQuant, Quantizer, positive
from lifequant.registry import register


class SimulatedGradient(torch.autograd.Function):
    """The step as it is; its gradient is simulated, whatever comes from above (Zhao et al.).

    Of the steps a/2, a and 2a the one with the least squared error of the tensor says where to go: +a^2 for a/2, 0 for a,
    -a^2 for 2a, so that descent shrinks, keeps or widens the step. A tie keeps it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(size: Tensor, rows: Tensor, qn: int, qp: int) -> Tensor:
        return size.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        size, rows, ctx.qn, ctx.qp = inputs
        ctx.save_for_backward(size, rows)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None, None]:
        size, rows = ctx.saved_tensors
        return simulated_gradient(size, rows, ctx.qn, ctx.qp), None, None, None


def simulated_gradient(size: Tensor, rows: Tensor, qn: int, qp: int) -> Tensor:
    """Shape of ``size``, [] or [C]; ``rows`` [1 or C, N] are the values that share a step."""
    u = rows / size.reshape(-1, 1)
    half, same, twice = ((u - f * (u / f).round().clamp(qn, qp)).square().sum(1) for f in (0.5, 1.0, 2.0))
    sign = ((half < same) & (half <= twice)).to(u.dtype) - ((twice < same) & (twice < half)).to(u.dtype)
    return sign.reshape(size.shape) * size.square().clamp(max=torch.finfo(size.dtype).max)


class LLSQ(FakeQuant):
    """v_q = a * round(clamp(v / a, qn, qp)), as lsq; the gradient of a is simulated."""

    def __init__(self, bits: int, qn: int, qp: int, channels: int | None = None) -> None:
        super().__init__(bits, qn, qp)
        self.channels = channels
        self.step_size = nn.Parameter(torch.ones(() if channels is None else channels))

    def to_codes(self, x: Tensor) -> Tensor:
        return x / self.broadcast_channels(self.scale(), x)

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        rows = self.channel_rows(x.detach(), self.channels)
        return u * self.broadcast_channels(SimulatedGradient.apply(positive(self.step_size), rows, self.qn, self.qp), x)

    def scale(self) -> Tensor:
        return positive(self.step_size.detach())


class LLSQWeight(LLSQ):
    """Signed: codes -2^(b-1) .. 2^(b-1)-1; the weights' gradient passes where they are clipped, too.

    Initial a = max|w| / 2^(b-1); one for each channel: max|w| / qp.
    """

    linear = True

    def __init__(self, bits: int, channels: int | None = None) -> None:
        super().__init__(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, channels)

    def quantize(self, x: Tensor) -> Tensor:
        u = self.to_codes(x)
        if self.rounding:
            u = u.clamp(self.qn, self.qp).round()
        return self.dequantize(u.detach(), x) + (x - x.detach())

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        parts = 2 ** (self.bits - 1) if self.channels is None else self.qp
        size = self.channel_rows(x, self.channels).abs().amax(1) / parts
        self.step_size.copy_(size.clamp(min=STEP_FLOOR).view_as(self.step_size))


class LLSQActivation(LLSQ):
    """Unsigned, after a ReLU: codes 0 .. 2^b-1. Initial a = max / 2^b, at 2 and 3 bits max / (2 qp)."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits, 0, 2**bits - 1)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        self.step_size.copy_((x.amax() / (2**self.bits if self.bits >= 4 else 2 * self.qp)).clamp(min=STEP_FLOOR))


@register("quantizer", "llsq")
class LLSQQuantizer(Quantizer):
    help = "the step's gradient is simulated by comparing a/2, a and 2a (LLSQ, Zhao et al., ICLR 2020)"
    weight_type = LLSQWeight
    act_type = LLSQActivation
