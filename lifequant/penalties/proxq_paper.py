"""ProxQ's penalty with the published estimate and the paper's distance."""

from __future__ import annotations

from torch import Tensor, nn

from lifequant.data.task import Task
from lifequant.methods.importance import at_quantized_weights, latent_weights, per_batch
from lifequant.penalties.base import Anchored, has_replay
from lifequant.registry import register


@register("penalty", "proxq_paper")
class ProxQPaper(Anchored):
    """The published estimate (squared gradients of batch means, all replay data, no factor) with the paper's distance,
    that of the quantized weights."""

    help = "the paper's distance with the published estimate of the gradients"
    default_lambda = 100.0

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        if not has_replay(task, len(task.replay)):
            return None
        net = at_quantized_weights(model)
        return per_batch(net, latent_weights(net), task.batches(task.replay, task.batch_size))
