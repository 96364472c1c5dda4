"""ProxQ's penalty as the authors' code has it."""

from __future__ import annotations

from torch import Tensor, nn

from lifequant.data.task import Task
from lifequant.methods.importance import per_batch, protected
from lifequant.penalties.base import Anchored, has_replay
from lifequant.qat.modes import eval_mode
from lifequant.registry import register


@register("penalty", "proxq_published")
class ProxQPublished(Anchored):
    """The authors' code: lambda sum F (w - w_s)^2 over all parameters but the quantizers', latent; F of batch means on
    replay data."""

    help = "the authors' code: latent weights, all parameters, batch gradients"
    default_lambda = 100.0

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(protected(model))

    def anchors(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (value.detach(), value.new_ones(())) for name, value in self.values(model).items()}

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        if not has_replay(task, len(task.replay)):
            return None
        with eval_mode(model):
            return per_batch(model, self.values(model), task.batches(task.replay, task.batch_size))

    def memory_bytes(self) -> dict[str, int]:
        latent = sum(a.numel() * a.element_size() for a in self.anchor.values())
        return super().memory_bytes() | {"reference": latent}
