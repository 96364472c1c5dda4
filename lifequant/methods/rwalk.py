"""Riemannian walk."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from lifequant.common.arguments import int_at_least, real
from lifequant.data.task import Task
from lifequant.methods.importance import flat, protected
from lifequant.methods.regularizer import Regularizer
from lifequant.registry import register


@register("method", "rwalk")
class RWalk(Regularizer):
    """sum_i (F_i / max F + s_i / max s) (w_i - w*_i)^2 (Chaudhry et al., ECCV 2018, eq. 8), in which

    F <- a F + (1 - a) g^2 at every step, g the gradient of the batch's mean task loss (EWC++, eq. 6), and
    s_i = sum over segments of ``every`` steps of (fall of the loss by i) / (F_i D_i^2 / 2 + epsilon) (eq. 7), the path
    integral in the Fisher metric, D_i the segment's way; as a task ends, s is averaged with that of former tasks, and
    what is negative counts as 0. The penalty's gradient takes no part.
    """

    help = "Riemannian walk: moving Fisher and path integral in its metric (Chaudhry et al., ECCV 2018)"
    defaults = Regularizer.defaults | {"ll_lambda": 10.0}
    per_step_state = True
    importances = ("importance", "fisher", "score", "gained", "path", "origin")
    compilable = ("gradient_and_weights", "add_step")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.steps = 0  # of the task
        self.decay, self.every = self.option("decay"), self.option("every")

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        flags = (
            ("decay", real(0), 0.9, "decay of the Fisher's moving average"),
            ("every", int_at_least(1), 10, "steps of a segment of the path"),
            ("epsilon", real(above=0), 1e-7, "keeps the score of weights that hardly moved finite"),
        )
        for name, kind, default, text in flags:
            group.add_argument(f"--rwalk_{name}", type=kind, default=default, metavar=name[0].upper(), help=text)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        super().begin_task(model, task)
        self.steps = 0
        if self.used:
            self.gained.zero_()
            self.path.zero_()
            self.origin.copy_(flat(protected(model).values()).detach())

    def after_backward(self, model: nn.Module) -> None:
        if self.used:
            self.before_step = self.gradient_and_weights(model)

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr_ratio: float) -> None:
        if not self.used:
            return
        self.add_step(model, *self.before_step)
        self.steps += 1
        if self.steps % self.every == 0:
            self._end_segment(flat(protected(model).values()))

    @torch.no_grad()
    def add_step(self, model: nn.Module, gradient: Tensor, before: Tensor) -> None:
        """Add a step to the moving Fisher and to the path."""
        self.fisher.mul_(self.decay).add_(gradient.square(), alpha=1 - self.decay)
        self.path -= gradient * (flat(protected(model).values()) - before)

    def _end_segment(self, now: Tensor) -> None:
        distance = self.fisher * (now - self.origin).square() / 2
        self.gained += self.path / (distance + self.option("epsilon"))
        self.path.zero_()
        self.origin.copy_(now)

    @torch.no_grad()
    def estimate(self, model: nn.Module, task: Task) -> Tensor:
        self._end_segment(flat(protected(model).values()))
        self.score.copy_(self.gained if task.task_index == 0 else (self.score + self.gained) / 2)
        return _share_of_largest(self.fisher) + _share_of_largest(self.score.clamp(min=0))

    def merge(self, new: Tensor, weights: Tensor, task: Task) -> None:
        self.importance.copy_(new)  # fisher and score hold the former tasks' already
        self.anchor.copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps = state["steps"]


def _share_of_largest(values: Tensor) -> Tensor:
    """Values >= 0 over their maximum; zeros stay."""
    return values / values.max().clamp(min=torch.finfo(values.dtype).tiny)
