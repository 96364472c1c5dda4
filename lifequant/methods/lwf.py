"""Learning without forgetting."""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor, nn

from lifequant.common.arguments import real
from lifequant.data.task import Batch, Task
from lifequant.losses import distillation
from lifequant.methods.base import LifelongMethod
from lifequant.methods.growth import sized_like
from lifequant.registry import register


@register("method", "lwf")
class LwF(LifelongMethod):
    """Task loss + alpha * distillation of the former task's model on the new images, over the classes that it knew, at
    temperature T (Li and Hoiem, ECCV 2016). No image is stored; the former model is.

    In a loop of your own, Batch.teacher holds the former model's logits of the batch's images; of fewer classes than the
    model's, where the head has grown.
    """

    help = "learning without forgetting: distillation on the new images (Li and Hoiem, ECCV 2016)"
    regularizer = True
    needs_teacher = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        options = config.option(self.name)
        self.alpha, self.temperature = options["alpha"], options["temperature"]
        self.known: Tensor | None = None
        self.asks = False

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        group.add_argument("--lwf_alpha", type=real(0), metavar="A", default=10.0, help="weight of the distillation")
        group.add_argument(
            "--lwf_temperature", type=real(above=0), metavar="T", default=2.0, help="temperature of the distillation"
        )

    def begin_task(self, model: nn.Module, task: Task) -> None:
        super().begin_task(model, task)
        self.known = sized_like(self.known, task.old_classes)
        self.known.copy_(task.old_classes)
        self.asks = bool(task.old_classes.any())

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        loss = super().task_loss(logits, batch)
        if batch.teacher is None:
            if self.asks:
                raise ValueError("lwf: the batch lacks ``teacher``, the former model's logits of its images")
            return loss
        return loss + self.alpha * distillation(logits, batch.teacher, self.known, self.temperature)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"known": self.known, "asks": self.asks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.known, self.asks = state["known"], state["asks"]
