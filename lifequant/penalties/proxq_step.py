"""ProxQ's penalty as a proximal step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lifequant.data.task import Task
from lifequant.penalties.base import Anchored, Penalty, fisher_of_removed_classes
from lifequant.qat.weights import Weight, body_weights
from lifequant.quantizers.base import FakeQuant
from lifequant.registry import register


@register("penalty", "proxq_step")
class ProxQStep(Anchored):
    """A proximal step after SGD's, in the space of codes, stable for any strength k = lambda.

    With u the real-valued code and r the former integer code, d = u - r: |d| <- min(|d|, 1/2) + max(|d| - 1/2, 0) /
    (1 + k (eta_t / eta_0) Fn), Fn = F over its layer's mean, clipped at 10. Movement that changes no code is free.
    """

    help = "a proximal step after the optimizer's; movement within a code is free"
    default_lambda = 0.1
    compilable = ("move",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.strength: Tensor | None = None  # lambda eta_t / eta_0, a scalar on the device

    def anchors(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        codes = {w.name: w.quant.codes(w.tensor) for w in self._weights(model)}
        return {name: (c, torch.ones((), device=c.device)) for name, c in codes.items()}

    @staticmethod
    def _weights(model: nn.Module) -> list[Weight]:
        return [w for w in body_weights(model) if isinstance(w.quant, FakeQuant)]

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        fisher, _ = fisher_of_removed_classes(model, task)
        return fisher and {name: (f / f.mean().clamp(min=1e-30)).clamp(max=10) for name, f in fisher.items()}

    def penalty(self, model: nn.Module) -> Tensor:
        return Penalty.penalty(self, model)

    def after_step(self, model: nn.Module, lr_ratio: float) -> None:
        if self.strength is None:
            self.strength = next(model.parameters()).new_zeros(())
        self.strength.fill_(self.config.ll_lambda * lr_ratio)
        self.move(model)

    @torch.no_grad()
    def move(self, model: nn.Module) -> None:
        """The proximal step of all layers."""
        for w in self._weights(model):
            name, weight, quant = w.name, w.tensor, w.quant
            former = self.anchored(name)
            d = quant.to_codes(weight) - former
            size = d.abs()
            beyond = (size - 0.5).clamp(min=0) / (1 + self.strength * self.importance[name])
            u = former + d.sign() * (size.clamp(max=0.5) + beyond)
            moved = (beyond > 0) & (self.importance[name] > 0)
            weight.copy_(torch.where(moved, quant.inverse(u, weight), weight))
