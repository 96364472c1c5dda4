"""Dark experience replay ++."""

from __future__ import annotations

import argparse
from typing import Any

from torch import Tensor, nn

from lifequant.common.arguments import real
from lifequant.data.task import Batch, Task
from lifequant.methods.base import LifelongMethod
from lifequant.methods.stored_logits import StoredLogits
from lifequant.registry import register


@register("method", "derpp")
class DERpp(LifelongMethod):
    """Replay + alpha * mean squared difference of a replay image's logits from those stored with it (Buzzega et al.,
    NeurIPS 2020, eq. 6).

    The label loss is that of the pool's mean, new and replay images alike, so that ``--loss`` and ``--sampler`` apply;
    Buzzega et al. draw two batches of stored images, one for the logits, and one for the labels with a weight beta. Here the
    batch's stored images (``--replay_batch``) serve both. Logits are computed at the end of the task that an image belongs
    to (theirs, while it is trained on), in eval mode, of the image as it is.
    """

    batch_separable = False  # the distance is a mean over the batch's replay images alone
    help = "dark experience replay ++: replay with stored logits (Buzzega et al., NeurIPS 2020)"
    defaults = LifelongMethod.defaults | {"replay": True, "replay_batch": 0.5}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.alpha = config.option(self.name)["alpha"]
        self.stored = StoredLogits()

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--derpp_alpha", type=real(0), metavar="A", default=0.1, help="weight of the stored logits' term"
        )

    def begin_task(self, model: nn.Module, task: Task) -> None:
        super().begin_task(model, task)
        self.stored.update(model, task, recompute=False)

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        term = self.stored.distance(logits, batch) / logits.shape[1]
        return super().task_loss(logits, batch) + self.alpha * term

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"stored": self.stored.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.stored.load_state_dict(state["stored"])

    def bytes_per_image(self, num_classes: int) -> int:
        return self.stored.bytes_per_image(num_classes)

    def memory_bytes(self) -> dict[str, int]:
        return {"logits": self.stored.nbytes()}
