"""A moving average of the weights (Polyak & Juditsky 1992), which in continual learning forgets less than the weights
themselves (mean teacher in replay, Mean-ER)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """a <- decay a + (1 - decay) w after each step, over all that a checkpoint of the model holds.

    Latent weights, BatchNorm's affine and statistics, and the quantizers' own parameters are averaged; integer buffers
    are copied. The average starts as a copy at the first update. A network that loads it quantizes the averaged latent
    weights, so it has its b bits. ``decay`` is in [0, 1): 0.999 averages over about the last 1,000 steps. Keeps the
    model's size once more (float32), on its device, and never synchronizes it. Raises ValueError for another decay.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: must be at least 0 and below 1")
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After each step."""
        state = model.state_dict()
        if not self.average:
            self.average = {name: value.clone() for name, value in state.items()}
            return
        floating = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in floating], [state[n] for n in floating], 1 - self.decay)
        for name in state.keys() - floating:
            self.average[name].copy_(state[name])

    def averaged_state(self, model: nn.Module) -> dict[str, Tensor]:
        """A copy to be loaded by ``load_state_dict`` of such a model; before the first update, the model's own."""
        return {name: self.average.get(name, value).clone() for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs but ``decay``, which is an option."""
        return {"average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = {name: value.clone() for name, value in state["average"].items()}

    def memory_bytes(self) -> int:
        """Bytes of the average."""
        return sum(value.numel() * value.element_size() for value in self.average.values())
