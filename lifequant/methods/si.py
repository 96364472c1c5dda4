"""Synaptic intelligence."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from lifequant.common.arguments import real
from lifequant.data.task import Task
from lifequant.methods.importance import flat, protected
from lifequant.methods.regularizer import Regularizer
from lifequant.registry import register


@register("method", "si")
class SI(Regularizer):
    """sum_i Omega_i (w_i - w*_i)^2, Omega_i += max(0, omega_i / (D_i^2 + xi)) as a task ends (Zenke et al., ICML 2017, eq. 4-5).

    omega_i = - sum over steps of (d task loss / d w_i) * (the step's change of w_i): the part of the loss's fall that
    weight i brought about; D_i is its way since the task's begin. The penalty's gradient takes no part.
    """

    help = "synaptic intelligence: path integral of the task loss (Zenke et al., ICML 2017)"
    defaults = Regularizer.defaults | {"ll_lambda": 0.01}
    per_step_state = True
    importances = ("importance", "path")
    compilable = ("gradient_and_weights", "add_to_path")

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--si_xi",
            type=real(above=0),
            metavar="XI",
            default=1.0,
            help="keeps the importance of weights that hardly moved finite",
        )

    def begin_task(self, model: nn.Module, task: Task) -> None:
        super().begin_task(model, task)
        if self.used:
            self.path.zero_()

    def after_backward(self, model: nn.Module) -> None:
        if self.used:
            self.before_step = self.gradient_and_weights(model)

    def after_step(self, model: nn.Module, lr_ratio: float) -> None:
        if self.used:
            self.add_to_path(model, *self.before_step)

    @torch.no_grad()
    def add_to_path(self, model: nn.Module, gradient: Tensor, before: Tensor) -> None:
        """Add -gradient * (weights - before)."""
        self.path -= gradient * (flat(protected(model).values()) - before)

    @torch.no_grad()
    def estimate(self, model: nn.Module, task: Task) -> Tensor:
        way = flat(protected(model).values()) - self.anchor  # the anchor is where this task began
        return (self.path / (way.square() + self.option("xi"))).clamp(min=0)
