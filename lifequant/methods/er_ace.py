"""Experience replay with asymmetric cross entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lifequant.data.task import Batch, Task
from lifequant.losses import only
from lifequant.methods.base import LifelongMethod
from lifequant.registry import register


@register("method", "er_ace")
class ERACE(LifelongMethod):
    """Replay; of a new image only the logits of classes present among the batch's new images take part in the loss, so
    that new classes do not push the old ones down; stored images use all (Caccia et al., ICLR 2022, eq. 4).

    The paper's memory is filled as images come, so that it has the task's own images, too: without them nothing ever
    compares new classes with old ones, and the new ones are not learned. Here the store has former tasks alone; in its
    place the first new images of each batch count as stored ones, as many as make a new class as
    frequent among those as a replayed one is; all of them where no image is stored, so that task 0 is plain. The loss of
    the whole batch is one mean, that of ``--loss`` on the masked logits; the paper adds two means. With half of each batch
    stored images, as in the paper, that is half of it.
    """

    batch_separable = False  # which classes are present depends on the whole batch
    help = "replay with asymmetric cross entropy (Caccia et al., ICLR 2022)"
    defaults = LifelongMethod.defaults | {"replay": True, "replay_batch": 0.5}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.share: Tensor | None = None  # float32 [], of a batch's new images: those that count as stored

    def begin_task(self, model: nn.Module, task: Task) -> None:
        super().begin_task(model, task)
        share = 1.0  # where nothing is stored, nothing is to be kept from being pushed
        if len(task.replay):
            replayed = task.epochs_of_replay * images_a_class(task.labels[task.replay])
            share = min(1.0, replayed / images_a_class(task.labels[task.new_rows]))
        if self.share is None:
            self.share = task.counts.new_zeros(())
        self.share.fill_(share)  # in place, so that a compiled step goes on with it

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        classes = torch.arange(logits.shape[1], device=logits.device)
        new = ~batch.is_replay
        rank = new.cumsum(0)  # of a new image among the new ones, from 1
        stored = batch.is_replay | (rank <= self.share * rank[-1])
        present = ((batch.y[:, None] == classes) & new[:, None]).any(0)
        return super().task_loss(only(logits, stored[:, None] | present), batch)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.share = state["share"]


def images_a_class(labels: Tensor) -> float:
    """Mean over the classes that are there."""
    return len(labels) / len(labels.unique())
