"""Online elastic weight consolidation."""

from __future__ import annotations

import argparse

from torch import Tensor, nn

from lifequant.common.arguments import real
from lifequant.data.task import Task
from lifequant.methods.ewc import fisher
from lifequant.methods.regularizer import Regularizer
from lifequant.registry import register


@register("method", "online_ewc")
class OnlineEWC(Regularizer):
    """1/2 sum_i F_i (w_i - w*_i)^2, F <- gamma F + F_new, w* the last task's weights (Schwarz et al., ICML 2018, eq. 9).

    F as in ewc. gamma is 1 by default, as in Mammoth: no task is forgotten on purpose; Schwarz et al. take less.
    """

    help = "online elastic weight consolidation, one anchor (Schwarz et al., ICML 2018)"
    defaults = Regularizer.defaults | {"ll_lambda": 0.3}

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        Regularizer.images_flag(group, "online_ewc", 1000)
        group.add_argument(
            "--online_ewc_gamma",
            type=real(0),
            metavar="G",
            default=1.0,
            help="what former importances are multiplied by as a task ends",
        )

    def estimate(self, model: nn.Module, task: Task) -> Tensor:
        return fisher(self, model, task) / 2

    def merge(self, new: Tensor, weights: Tensor, task: Task) -> None:
        self.importance *= self.option("gamma")
        super().merge(new, weights, task)
