"""Activation quantizers for layer inputs that are not a ReLU's output, and so may have a sign."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifequant.quantizers.alignq import AlignQActivation
from lifequant.quantizers.base import STEP_FLOOR, Quantizer
from lifequant.quantizers.dorefa import DoReFaActivation
from lifequant.quantizers.first_steps import least_error, sample_with_extremes
from lifequant.quantizers.llsq import LLSQ, LLSQActivation
from lifequant.quantizers.lsq import LSQ, LSQActivation
from lifequant.quantizers.lsqplus import LSQPlusActivation


class LSQInput(LSQ):
    """Signed: codes -2^(b-1) .. 2^(b-1)-1. Initial step: that of least squared error, as for a ReLU. Data that are zero
    throughout say nothing; the values then reach to 1."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def features(self, x: Tensor) -> int:
        return max(x.numel() // max(len(x), 1) if x.dim() else 1, 1)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        size = least_error(sample_with_extremes(x[x != 0]), self.qn, self.qp)[0] if x.any() else 1 / self.qp
        self.step_size.fill_(max(size, STEP_FLOOR))


class LLSQInput(LLSQ):
    """Signed: codes -2^(b-1) .. 2^(b-1)-1. Initial a = max|x| / 2^(b-1), at 2 and 3 bits max|x| / (2 qp), as for a ReLU."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        parts = 2 ** (self.bits - 1) if self.bits >= 4 else 2 * self.qp
        self.step_size.copy_((x.abs().amax() / parts).clamp(min=STEP_FLOOR))


def input_quantizer(family: Quantizer, bits: int, signed: bool) -> nn.Module:
    """A module for one layer's input; 32 bits is nn.Identity. Without ``signed``, no value is below zero.

    llsq has a signed form and lsqplus a learned offset. The others (alignq, apot, dorefa, lsq, pact, proxq, uniform) take
    lsq's form where the input has a sign. Where it has none they take what they have for a ReLU; alignq and dorefa
    take lsq's there too, because their range is fixed to what follows a BatchNorm.
    """
    if bits == 32 or issubclass(family.act_type, LSQPlusActivation):
        return family.activation(bits)
    if signed:
        return LLSQInput(bits) if issubclass(family.act_type, LLSQActivation) else LSQInput(bits)
    fixed = issubclass(family.act_type, AlignQActivation | DoReFaActivation)
    return LSQActivation(bits) if fixed else family.activation(bits)
