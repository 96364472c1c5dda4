"""An exponential moving average of the weights (Polyak & Juditsky 1992), which forgets less than the weights themselves
(mean teacher in replay, Mean-ER). torch computes it; a network that loads it quantizes the averaged latent weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """An average of ``model`` as it is; ``decay`` is in [0, 1]: 0.999 averages over about the last 1,000 steps."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@torch.no_grad()
def update_ema(ema: AveragedModel, model: nn.Module) -> None:
    """a <- decay a + (1 - decay) w over parameters and buffers, after each step; the first update copies.

    Integer buffers are copied, since torch would average and truncate them.
    """
    ema.update_parameters(model)
    for average, value in zip(ema.module.buffers(), model.buffers(), strict=True):
        if not value.is_floating_point():
            average.copy_(value)


def averaged_state(ema: AveragedModel) -> dict[str, Tensor]:
    """A copy of the averaged model's state dict, for ``load_state_dict`` of the model that is trained."""
    return {name: value.clone() for name, value in ema.module.state_dict().items()}


def ema_bytes(ema: AveragedModel) -> int:
    """Bytes that the average takes."""
    return sum(value.nbytes for value in ema.module.state_dict().values())
