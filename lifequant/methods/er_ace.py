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
    """Replay with two losses: of each new image among the classes of the batch's new images alone, so that new classes do
    not push the old ones down; of each stored image among all classes (Caccia et al., ICLR 2022, eq. 4).

    The paper's memory is filled as images come, so that it has the task's own images, too: without them nothing ever
    compares new classes with old ones, and the new ones are not learned. Here the store has former tasks alone; in its
    place the first new images of each batch have the second loss as well, as many as make a new class as frequent there
    as a stored one is. Task 0, which has no stored image, is plain. The loss is the mean of all terms, with that of
    ``--loss`` on the masked logits; the paper adds two means.
    """

    batch_separable = False  # which classes are present depends on the whole batch
    help = "replay with asymmetric cross entropy (Caccia et al., ICLR 2022)"
    defaults = LifelongMethod.defaults | {"replay": True, "replay_batch": 0.5}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.share: Tensor | None = (
            None  # float32 [], of a batch's new images: those that have the stored images' loss too; 2 where none is stored
        )

    def begin_task(self, model: nn.Module, task: Task) -> None:
        super().begin_task(model, task)
        share = 2.0
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
        among_all = batch.is_replay | (rank <= self.share * rank[-1])
        present = ((batch.y[:, None] == classes) & new[:, None]).any(0)
        own = batch.y[:, None] == classes  # an image among its own class alone has the loss 0, and no gradient
        full = super().task_loss(only(logits, among_all[:, None] | own), batch)
        masked = super().task_loss(only(logits, torch.where(new[:, None], present, own)), batch)
        has_store = (self.share <= 1).to(logits.dtype)
        terms = among_all.sum() + has_store * new.sum()
        return (full + has_store * masked) * len(logits) / terms

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"share": self.share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.share = state["share"]


def images_a_class(labels: Tensor) -> float:
    """Mean over the classes that are there."""
    return len(labels) / len(labels.unique())
