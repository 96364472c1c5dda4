"""What a quantizer gives, written as integers: weights as scale * codes + offset, activations as levels.

It asks a FakeQuant for its values alone, so a quantizer of another package is exported too, as long as its ``scale`` is the
distance of neighboring values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lifequant.qat.folding import FoldedWeight
from lifequant.quantizers.base import FakeQuant

CLOSE = 0.01  # of a code: float32 values of codes up to some thousands are off by less
GRID = 16  # parts of a step in which ``on_grid`` places a level that is no multiple of the step


@dataclass
class WeightCodes:
    """values = scale * codes + offset; codes int32 of the weight's shape, scale > 0 and offset float32 [] or [C]."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def fits(self, low: int, high: int) -> bool:
        return not self.offset.any() and int(self.codes.min()) >= low and int(self.codes.max()) <= high


@dataclass
class Steps:
    """value = scale * q + offset, q = clamp(round((x - offset) / scale), low, high)."""

    scale: float
    low: int
    high: int
    offset: float = 0.0


@dataclass
class Levels:
    """value = values[number of thresholds below x], both ascending, float64; there is a value more than thresholds."""

    thresholds: Tensor
    values: Tensor


@torch.no_grad()
def weight_codes(quant: FakeQuant, weight: Tensor) -> WeightCodes | None:
    """The integers of a quantized weight [C, ...]; None where its values are no multiples of half a step."""
    if isinstance(quant, FoldedWeight):
        inner = weight_codes(quant.quant, weight)
        return inner and _times(inner, quant.factor)
    values, step = quant(weight).double(), quant.scale().double()
    offset = step.new_zeros(())
    if quant.output_gain is not None:
        step, offset = step * quant.output_gain, quant.output_offset.double()
    rest = values - quant.broadcast_channels(offset, weight)
    for parts in (1, 2):  # dorefa's and alignq's values are odd multiples of half a step
        codes = rest / quant.broadcast_channels(step / parts, weight)
        if (codes - codes.round()).abs().max() < CLOSE:
            found = WeightCodes(codes.round().int(), (step / parts).float().abs(), offset.float())
            return _times(found, step.sign()) if (step < 0).any() else found
    return None


def _times(found: WeightCodes, factor: Tensor) -> WeightCodes:
    """Times a factor for each channel, whose sign goes to the codes."""
    shape = (-1, *[1] * (found.codes.dim() - 1))
    sign = torch.where(factor < 0, -1, 1).int()
    codes = found.codes * sign.view(shape)
    return WeightCodes(codes, (found.scale * factor.abs()).float(), (found.offset * factor).float())


@torch.no_grad()
def rounded_to_8_bits(values: Tensor) -> WeightCodes:
    """int8 codes nearest to ``values`` [C, ...], with a scale for each channel."""
    rows = values.detach().flatten(1).double()
    scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    codes = (rows / scale[:, None]).round().int().view(values.shape)
    return WeightCodes(codes, scale.float(), torch.zeros(()))


@torch.no_grad()
def activation_levels(quant: FakeQuant) -> Steps | Levels:
    """What an activation quantizer does, the ReLU behind it included where it comes before one."""
    codes = torch.arange(quant.qn, quant.qp + 1, dtype=torch.float32, device=_device(quant))
    values, thresholds = quant.dequantize(codes, codes).double(), quant.inverse(codes[:-1] + 0.5, codes).double()
    unit = 1.0 if quant.input_scale is None else quant.input_scale.double()
    values, thresholds = (values * unit).cpu(), (thresholds * unit).cpu()
    step = float(quant.scale().double().cpu() * (unit if isinstance(unit, float) else unit.cpu()))
    is_straight = torch.allclose(values.diff(), torch.full_like(thresholds, step), rtol=1e-3, atol=0)
    is_nearest = torch.allclose(thresholds, (values[:-1] + values[1:]) / 2, rtol=0, atol=1e-3 * step)
    if is_straight and is_nearest and not quant.before_relu:
        offset = float(values[0]) - step * quant.qn
        return Steps(step, quant.qn, quant.qp, offset if abs(offset) > 1e-5 * step else 0.0)
    if quant.before_relu:
        values = values.relu()
        first = int((values > 0).int().argmax())
        values, thresholds = values[first - 1 :], thresholds[first - 1 :]
    return Levels(thresholds, values)


def as_levels(steps: Steps) -> Levels:
    values = torch.arange(steps.low, steps.high + 1, dtype=torch.float64) * steps.scale + steps.offset
    return Levels((values[:-1] + values[1:]) / 2, values)


def integer_levels(levels: Levels) -> tuple[Tensor, float] | None:
    """(uint8 codes, scale) with values = scale * codes, exactly; None where they take more than 8 bits or a sign."""
    reach = float(levels.values[-1])
    steps = reach / float(levels.values.diff().min())
    for top in (round(steps), round(2 * steps)):  # the smallest distance, or half of it, is the scale
        codes = levels.values * (top / reach)
        if 0 < top <= 255 and codes.min() > -CLOSE / 10 and (codes - codes.round()).abs().max() < CLOSE / 10:
            return codes.round().to(torch.uint8), reach / top
    return None


def on_grid(levels: Levels) -> tuple[Tensor, float, int]:
    """(uint8 codes, scale, zero): values nearly scale * (codes - zero), and exactly 0 at ``zero``.

    The grid's step is a 16th of the smallest distance of two values, or what 8 bits allow.
    """
    low, high = min(float(levels.values[0]), 0.0), max(float(levels.values[-1]), 0.0)
    scale = max(float(levels.values.diff().min()) / GRID, (high - low) / 254)
    zero = round(-low / scale)
    return ((levels.values / scale).round() + zero).clamp(0, 255).to(torch.uint8), scale, zero


def _device(quant: FakeQuant) -> torch.device | None:
    return next((t.device for t in (*quant.parameters(), *quant.buffers())), None)
