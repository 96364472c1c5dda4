"""ProxQ's penalty: the default form."""

from __future__ import annotations

from torch import Tensor, nn

from lifequant.data.task import Task
from lifequant.penalties.base import Anchored, fisher_of_removed_classes
from lifequant.registry import register


@register("penalty", "proxq")
class ProxQ(Anchored):
    """(kappa_t / 2) sum_i F_i (w_i^q - w_{s,i}^q)^2: the Laplace reading, in which the penalty stands for missing data.

    F per sample, in eval mode, at w_s, on replay of the classes that the new task no longer has, clipped at the
    layer's 99.9 % quantile. kappa_t = (images of those classes that are gone) / (images in the pool).
    """

    help = "quantized weights stay near the former ones, weighted per image (default)"
    default_lambda = 3.0  # the best on held-out images: resnet-20-cifar-10/results/search_strength

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        fisher, kappa = fisher_of_removed_classes(model, task)
        return fisher and {name: f.clamp(max=f.flatten().quantile(0.999)) * (kappa / 2) for name, f in fisher.items()}
