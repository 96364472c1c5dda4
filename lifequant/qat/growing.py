"""Let a weight's quantizer grow with the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifequant.common.errors import UserError
from lifequant.qat.refit import refit_weight
from lifequant.quantizers.base import HALF, FakeQuant


@torch.no_grad()
def grow(quant: nn.Module | None, weight: Tensor) -> None:
    """Give a quantizer with a scale for each output channel as many scales as ``weight`` [C, ...] has channels, in place.

    Old channels come first and keep their scales. The scales of new ones are set from their weights if the old ones are set;
    where a channel's weights are all alike, as zeros are, it takes the mean of the old scales. The quantizer's parameters are
    new. Nothing happens where the numbers agree or there is one scale. Raises UserError for a weight with fewer channels.
    """
    old, new = getattr(quant, "channels", None), weight.shape[0] if weight.dim() else 0
    if not isinstance(quant, FakeQuant) or old is None or old == new or weight.dim() < 2:
        return
    if next(quant.children(), None) is not None:
        raise UserError(f"a {type(quant).__name__} can't grow: let the layer grow before it is folded or packed")
    if new < old:
        raise UserError(
            f"a weight with {old} output channels and a scale for each can't become one with {new}: append new outputs behind "
            "the old ones, and take none away"
        )
    former = {name: t.clone() for name, t in _by_channel(quant).items()}
    for name, t in former.items():
        longer = torch.cat([t, t.mean(0, keepdim=True).expand(new - old, *t.shape[1:])])
        if name in quant._parameters:
            quant._parameters[name] = nn.Parameter(longer, quant._parameters[name].requires_grad)
        else:
            quant._buffers[name] = longer
    quant.channels = new
    if not quant.calibrated or weight.is_meta:
        return
    means = {name: t.clone() for name, t in _by_channel(quant).items()}
    quant.calibrate(weight.float() if weight.dtype in HALF else weight)
    refit_weight(quant, weight)
    rows = weight.flatten(1)
    keeps = (rows == rows[:, :1]).all(1)
    keeps[:old] = True
    for name, t in _by_channel(quant).items():
        t[keeps] = means[name][keeps]


def _by_channel(quant: FakeQuant) -> dict[str, Tensor]:
    """The quantizer's own tensors with an entry for each channel."""
    own = {**quant._parameters, **quant._buffers}
    return {
        name: t
        for name, t in own.items()
        if t is not None and name not in quant.tables and t.dim() and len(t) == quant.channels
    }
