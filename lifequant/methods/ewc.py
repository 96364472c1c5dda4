"""Elastic weight consolidation."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant.data.task import Task
from lifequant.methods.importance import flat, image_means, protected
from lifequant.methods.regularizer import Regularizer
from lifequant.registry import register


@register("method", "ewc")
class EWC(Regularizer):
    """1/2 sum_t sum_i F_{t,i} (w_i - w*_{t,i})^2, an anchor for each former task (Kirkpatrick et al., PNAS 2017, eq. 3).

    F_t = E[(d log p(y|x) / d w)^2], one image at a time, with the true labels, on the finished task's own training data
    in eval mode. Memory does not grow: a sum of parabolas is sum_t F_t (w - m)^2 plus a constant, m their weighted mean,
    which is exact and free of cancellation.
    """

    help = "elastic weight consolidation, an anchor for each task (Kirkpatrick et al., PNAS 2017)"
    defaults = Regularizer.defaults | {"ll_lambda": 0.3}

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        Regularizer.images_flag(group, "ewc", 1000)

    def estimate(self, model: nn.Module, task: Task) -> Tensor:
        return fisher(self, model, task) / 2

    def merge(self, new: Tensor, weights: Tensor, task: Task) -> None:
        total = self.importance + new
        share = torch.where(total > 0, new / total, 1)  # a weight that nothing needs has its anchor where it is
        self.offset += (self.importance * share * (weights - self.anchor).square()).sum()
        self.anchor.lerp_(weights, share)
        self.importance.copy_(total)


def fisher(method: Regularizer, model: nn.Module, task: Task) -> Tensor:
    """[P], the diagonal of the empirical Fisher matrix: mean over images of squared gradients of the cross entropy."""
    batches = method.batches(task, task.batch_size)
    return flat(image_means(model, protected(model), batches, F.cross_entropy, torch.square).values())
