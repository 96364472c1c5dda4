"""How far a quantizer changes what it is given, and a quantizer that is made to fit.

Some quantizers are made for layers with a BatchNorm behind them that is trained on: proxq drops a weight's mean, apot,
alignq, dorefa and uniform its scale, dorefa and alignq clip activations at a fixed value. In a trained network that changes
the function. Where the error is out of proportion to the bits, weights' values get a gain and an offset (for each scale
those of least squares), and activations a range from data. Weights that a tanh bends are first made small. All of this is fixed:
the values are as many as before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifequant.quantizers.base import FakeQuant
from lifequant.quantizers.first_steps import high_quantile

# Relative error (root mean square) of the best uniform quantizer of a Gaussian (Max, IRE Trans. Inf. Theory 1960; tests
# recompute it).
GAUSSIAN = {2: 0.345, 3: 0.193, 4: 0.107, 5: 0.0591, 6: 0.0323, 8: 0.0094}
FACTOR = 4  # an error more than this many times larger is out of proportion,
LARGEST = 0.7  # and any that is larger than this
REFIT = 2  # what is fitted, where it can be, is an error more than this many times larger


@torch.no_grad()
def relative_error(quant: FakeQuant, x: Tensor) -> float:
    """||Q(x) - x|| / ||x||; of an activation that is quantized before its ReLU, behind it. 0 where x is 0."""
    x = x.float()
    found = quant.forward(x)  # no hooks: one of them may be the caller
    error, size = found - x, x
    if quant.before_relu:
        error, size = found.relu() - x.relu(), x.relu()
    return float(error.norm() / size.norm()) if size.any() else 0.0


def is_out_of_proportion(quant: FakeQuant, error: float, factor: float = FACTOR) -> bool:
    """Whether a relative error says that the tensor does not suit the quantizer, and not just its bits."""
    return not error <= min(factor * GAUSSIAN[quant.bits], LARGEST)


@torch.no_grad()
def refit_weight(quant: FakeQuant, weight: Tensor) -> None:
    """Give a calibrated weight quantizer a gain and an offset if its error is large without, and a smaller input if
    it still is."""
    if quant.output_gain is None:
        return
    quant.output_gain.fill_(1.0)
    quant.output_offset.fill_(0.0)
    if quant.input_scale is not None:
        quant.input_scale.fill_(1.0)
    weight = weight.float()
    if not is_out_of_proportion(quant, relative_error(quant, weight), REFIT):
        return
    _fit(quant, weight)
    if quant.input_scale is not None and is_out_of_proportion(quant, relative_error(quant, weight), REFIT):
        largest = quant.channel_rows(weight, getattr(quant, "channels", None)).abs().amax(1)
        quant.input_scale.copy_(torch.where(largest > 0, largest / quant.straight_to, 1.0))
        _fit(quant, weight)


def _fit(quant: FakeQuant, weight: Tensor) -> None:
    """Set gain and offset to those of least squares."""
    channels = getattr(quant, "channels", None)
    values = quant.quantize(quant.scaled_input(weight))
    x, y = (quant.channel_rows(of, channels).double() for of in (weight, values))
    centered = y - y.mean(1, keepdim=True)
    spread = centered.square().sum(1)
    gain = torch.where(spread > 0, (centered * x).sum(1) / spread.clamp(min=torch.finfo(spread.dtype).tiny), 1.0)
    quant.output_gain.copy_(gain)
    quant.output_offset.copy_(x.mean(1) - gain * y.mean(1))


@torch.no_grad()
def refit_activation(quant: FakeQuant, x: Tensor) -> None:
    """Give an activation quantizer with a fixed range that of ``x``, if it is out of proportion without and better with."""
    if quant.input_scale is None:
        return
    quant.input_scale.fill_(1.0)
    former = relative_error(quant, x)
    if is_out_of_proportion(quant, former):
        top = quant.dequantize(torch.tensor(float(quant.qp), device=x.device), x)
        quant.input_scale.copy_((high_quantile(x.float()) / top).clamp(min=torch.finfo(torch.float32).tiny))
        if relative_error(quant, x) >= former:
            quant.input_scale.fill_(1.0)
