"""An exponential moving average of the weights (Polyak & Juditsky 1992), which forgets less than the weights themselves
(mean teacher in replay, Mean-ER). A network that loads it quantizes the averaged latent weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """a <- decay a + (1 - decay) w over parameters and buffers, integers apart, which are copied.

    ``decay`` is in [0, 1]: 0.999 averages over about the last 1,000 steps. ``model`` is a network of its own with the averages.
    torch's AveragedModel would take a kernel for each integer buffer, and wait for a GPU at each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = copy.deepcopy(model), decay, 0
        averages, values = (list(m.state_dict().values()) for m in (self.model, model))
        floats = [value.is_floating_point() for value in values]
        self.floats = [[t for t, keep in zip(part, floats, strict=True) if keep] for part in (averages, values)]
        self.others = [[t for t, drop in zip(part, floats, strict=True) if not drop] for part in (averages, values)]

    @torch.no_grad()
    def update(self) -> None:
        """Take over the model as it is now, after each step. The first update copies it."""
        torch._foreach_lerp_(*self.floats, 1 - self.decay if self.updates else 1.0)
        if self.others[0]:
            torch._foreach_copy_(*self.others)
        self.updates += 1

    def averaged_state(self) -> dict[str, Tensor]:
        """A copy of the averaged model's state dict, for ``load_state_dict`` of the model that is trained."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def nbytes(self) -> int:
        """Bytes that the average takes."""
        return sum(value.nbytes for value in self.model.state_dict().values())

    def state_dict(self) -> dict[str, Tensor]:
        """Named as AveragedModel has it."""
        averages = {f"module.{name}": value for name, value in self.model.state_dict().items()}
        return {"n_averaged": torch.tensor(self.updates), **averages}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        state = dict(state)
        self.updates = int(state.pop("n_averaged"))
        self.model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
