"""The functional form of ProxQ's penalty."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lifequant.data.task import Batch, Task
from lifequant.methods.growth import sized_like
from lifequant.methods.stored_logits import StoredLogits
from lifequant.penalties.base import Penalty, has_replay
from lifequant.registry import register


@register("penalty", "proxq_function")
class ProxQFunction(Penalty):
    """The functional form: mean over the batch's replay images of ||f_t(x) - f_s(x)||^2 / |classes that s knew|, over
    those classes. Weights may move wherever old outputs do not.

    f_s are the former task's logits in eval mode of the image as it is, computed for all replay images as a task begins.
    Close to dark experience replay, which keeps the logits of an image's own task.
    """

    help = "old outputs on replay images stay near the former model's"
    batch_separable = False  # a mean over the batch's replay images alone
    default_lambda = 0.5

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stored = StoredLogits()
        self.known: Tensor | None = None

    def begin_task(self, model: nn.Module, task: Task) -> None:
        self.stored.update(model, task, recompute=True)
        self.known = sized_like(self.known, task.old_classes)
        self.known.copy_(task.old_classes)
        if task.task_index > 0:
            has_replay(task, len(task.replay))

    def output_penalty(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.stored.distance(logits, batch, self.known) / self.known.sum().clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        return {"known": self.known, "stored": self.stored.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.known = state["known"]
        self.stored.load_state_dict(state["stored"])

    def bytes_per_image(self, num_classes: int) -> int:
        return self.stored.bytes_per_image(num_classes)

    def memory_bytes(self) -> dict[str, int]:
        return {"logits": self.stored.nbytes()}
