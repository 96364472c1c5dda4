"""Memory aware synapses."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from lifequant.data.task import Task
from lifequant.methods.importance import flat, image_means, protected
from lifequant.methods.regularizer import Regularizer
from lifequant.registry import register


@register("method", "mas")
class MAS(Regularizer):
    """sum_i Omega_i (w_i - w*_i)^2, Omega_i += E |d ||f(x)||^2 / d w_i| (Aljundi et al., ECCV 2018, eq. 2-4).

    The absolute value of each image's gradient, f the logits; the importances of tasks add up. No label is used.
    """

    help = "memory aware synapses: sensitivity of the outputs' norm (Aljundi et al., ECCV 2018)"
    defaults = Regularizer.defaults | {"ll_lambda": 0.0003}

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        Regularizer.images_flag(group, "mas", 1000)

    def estimate(self, model: nn.Module, task: Task) -> Tensor:
        batches = self.batches(task, task.batch_size)
        return flat(image_means(model, protected(model), batches, squared_norm, torch.abs).values())


def squared_norm(logits: Tensor, y: Tensor) -> Tensor:
    """Scalar from logits [1, C]."""
    return logits.square().sum()
