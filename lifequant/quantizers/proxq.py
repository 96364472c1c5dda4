"""ProxQ's projection: weights are quantized in a standard space that is the same for every task (LifeQuant, ICCV 2023).

The penalty that keeps the quantized weights near the former task's is in lifequant/penalties/.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from lifequant.common.arguments import boolean, real
from lifequant.quantizers.base import FakeQuant, Quantizer, positive, standardize
from lifequant.quantizers.lsq import LSQActivation
from lifequant.registry import register

# The c with the least squared error for a Gaussian weight; the paper's is 3 at every bit-width (tests recompute these).
BEST_C = {2: 1.225, 3: 1.95, 4: 2.475, 5: 2.9, 6: 3.27, 8: 3.92}


class ProxQWeight(FakeQuant):
    """w_hat = (alpha/c) (w - mean) / std, quantized uniformly on [-alpha, alpha] with the symmetric codes -qp .. qp.

    The codes depend on (w - mean)/std and c alone. alpha only scales the output (behind a BatchNorm its gradient is 0):
    calibrate() sets it to c * std, so that the layer starts with its own scale, and it stays. The gradient goes
    straight through the rounding and truly through mean and std. c is learned if ``learn_c``.
    """

    linear = True
    keeps_range = False
    of_codes = ("c",)

    def __init__(self, bits: int, c: float | None = None, learn_c: bool = False, channels: int | None = None) -> None:
        qp = 2 ** (bits - 1) - 1
        super().__init__(bits, -qp, qp)
        self.channels = channels
        shape = () if channels is None else (channels,)
        self.c = nn.Parameter(torch.full(shape, float(BEST_C[bits] if c is None else c)), requires_grad=learn_c)
        self.register_buffer("alpha", torch.ones(shape))

    def to_codes(self, x: Tensor) -> Tensor:
        centered, std = standardize(x, self.channels)
        return centered * (self.qp / (self.broadcast_channels(positive(self.c), x) * std))

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return u * self.broadcast_channels(self.scale(), x)

    def inverse(self, u: Tensor, x: Tensor) -> Tensor:
        centered, std = standardize(x, self.channels)
        return x - centered + u * (self.broadcast_channels(positive(self.c), x) * std / self.qp)

    def scale(self) -> Tensor:
        return self.alpha / self.qp

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.refuse_non_finite(x)
        self.alpha.copy_(positive(self.c) * standardize(x, self.channels)[1].view_as(self.c))


@register("quantizer", "proxq")
class ProxQQuantizer(Quantizer):
    help = "weights in ProxQ's standard space (LifeQuant, ICCV 2023), activations as lsq"
    weight_type = ProxQWeight
    act_type = LSQActivation

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--proxq_c",
            type=real(above=0),
            metavar="C",
            help="weights beyond C standard deviations are clipped (default: least squared error, "
            + ", ".join(f"{c} at {b}" for b, c in BEST_C.items())
            + " bits; the paper's is 3)",
        )
        group.add_argument(
            "--proxq_learn_c",
            type=boolean,
            nargs="?",
            const=True,
            metavar="BOOL",
            help="learn c from data, per layer (default: False)",
        )
