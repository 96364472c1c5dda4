"""How the quantizers' parameters are trained, by this package and in a loop of your own:

optimizer = torch.optim.SGD(param_groups(q, lr=0.01, weight_decay=1e-4), momentum=0.9)
scales = Scales(q)
...
with scales.limit_scale_updates():
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lifequant.qat.layers import fake_quants
from lifequant.quantizers.base import STEP_FLOOR

STEP_CHANGE = 0.1  # of a step size, at most, in one update


def param_groups(q: nn.Module, lr: float, weight_decay: float = 0.0, step_lr: float = 0.1) -> list[dict[str, Any]]:
    """Groups for an optimizer: the quantizers' parameters at ``step_lr`` times ``lr``, without weight decay, which would
    shrink them to nothing (PACT's clipping level apart).

    At the weights' learning rate steps never come to rest, and a network learns less well than its bits allow.
    """
    decayed = {id(p): quant.weight_decay for _, quant in fake_quants(q) for p in quant.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in q.parameters():
        if p.requires_grad:
            key = (lr if id(p) not in decayed else lr * step_lr, weight_decay if decayed.get(id(p), True) else 0.0)
            groups.setdefault(key, []).append(p)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


class Scales:
    """All scales of a model that are learned. An update changes a scale by at most a tenth, and no scale falls below a floor.

    A step is small, 0.003 for 8-bit weights of 0.4, and its gradient is multiplied by the largest code where values are
    clipped. When the loss jumps, as at a change of tasks, one update could take it below 0, which flips signs without a
    word; at a floor every value is clipped, no weight has a gradient, and the layer is dead. How many updates were bounded
    is counted, for the run to warn of it.
    """

    def __init__(self, model: nn.Module) -> None:
        quants = [(name, quant, quant.scale_parameters()) for name, quant in fake_quants(model)]
        self.parameters = [p for _, _, params in quants for p in params]
        self.names = [name for name, _, params in quants for _ in params]
        device = self.parameters[0].device if self.parameters else None
        self.sizes = [p.numel() for p in self.parameters]
        self.limited_updates = torch.zeros(sum(self.sizes), device=device)

    @contextmanager
    def limit_scale_updates(self) -> Iterator[None]:
        """Put this around the optimizer's step. It takes a few kernels and does not wait for a GPU."""
        if not self.parameters:
            yield
            return
        with torch.no_grad():
            before = torch.cat([p.flatten() for p in self.parameters])
            yield
            now = torch.cat([p.flatten() for p in self.parameters])
            room = STEP_CHANGE * before.abs()
            kept = now.clamp(before - room, before + room)
            self.limited_updates += kept != now
            kept.clamp_(min=STEP_FLOOR)
            parts = zip(self.parameters, kept.split(self.sizes), strict=True)
            torch._foreach_copy_(self.parameters, [part.view_as(p) for p, part in parts])

    def most_limited(self) -> dict[str, int]:
        """{quantizer: updates that were limited in this task}; the most of any of its channels."""
        most = [int(part.max()) for part in self.limited_updates.split(self.sizes)] if self.sizes else []
        return dict(zip(self.names, most, strict=True))
