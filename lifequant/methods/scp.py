"""Sliced Cramer preservation."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from lifequant.common.arguments import int_at_least
from lifequant.data.task import Task
from lifequant.methods.importance import sliced
from lifequant.methods.regularizer import Regularizer
from lifequant.registry import register


@register("method", "scp")
class SCP(Regularizer):
    """sum_i Gamma_i (w_i - w*_i)^2, Gamma_i += E_xi (d xi . m / d w_i)^2, m = mean over images of the logits f(x),
    xi uniform on the unit sphere of the K outputs (Kolouri et al., ICLR 2020, alg. 1).

    Without slices the expectation is taken exactly, E xi xi^T = I / K: Gamma_i = ||d m / d w_i||^2 / K, by K backward
    passes instead of one for each slice.
    """

    help = "sliced Cramer preservation: the distribution of outputs (Kolouri et al., ICLR 2020)"
    defaults = Regularizer.defaults | {"ll_lambda": 0.1}

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        Regularizer.images_flag(group, "scp", 200)
        group.add_argument(
            "--scp_slices",
            type=int_at_least(0),
            metavar="N",
            default=0,
            help="random directions of the outputs; 0: exact, one backward pass for each class",
        )

    def estimate(self, model: nn.Module, task: Task) -> Tensor:
        parts = [x for x, _ in self.batches(task, task.batch_size)]
        return sliced(model, parts, self.directions(task).to(parts[0]))

    def directions(self, task: Task) -> Tensor:
        """[S, K], on the CPU: rows whose mean squared projection is sought."""
        slices, classes = self.option("slices"), task.num_classes
        if slices == 0:  # the mean over these K of (e_k . dm)^2 is ||dm||^2 / K
            return torch.eye(classes)
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + task.task_index)
        return nn.functional.normalize(torch.randn(slices, classes, generator=generator), dim=1)
