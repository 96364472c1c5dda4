"""Task losses: pure functions of logits [N, C], labels [N] and class counts [C] of the current training pool.

p_j is class j's share of what the current task trains on (new data and replay), before any sampler; K is the number of
classes present; BaLL's rebalancing weight is r_j = 1 / (K p_j + 1), 1 for a class that is absent (LifeQuant, ICCV 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def rebalancing_weights(counts: Tensor) -> Tensor:
    """r [C] from class counts [C] (float)."""
    return 1 / ((counts > 0).sum() * counts / counts.sum() + 1)


def ce(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Plain cross entropy."""
    return F.cross_entropy(logits, y)


def ball_prior(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Cross entropy of phi - log r: the paper's weight as a class prior, so that rare classes are held up at test time."""
    return F.cross_entropy(logits - rebalancing_weights(counts).log(), y)


def ball(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Cross entropy of phi + s, s_j = r_j softmax(phi)_j: the paper's formula as published. It holds rare classes down."""
    return F.cross_entropy(logits + rebalancing_weights(counts) * logits.softmax(1), y)


def ball_negative(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """``ball`` with its sign turned, for the ablation."""
    return F.cross_entropy(logits - rebalancing_weights(counts) * logits.softmax(1), y)


def balanced_softmax(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Cross entropy of phi + log p (Ren et al., NeurIPS 2020); a class that is absent takes no part."""
    return F.cross_entropy(logits + (counts / counts.sum()).log(), y)


def class_balanced(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Cross entropy weighted by (1 - b) / (1 - b^n), b = 0.9999, mean weight 1 over the classes present (Cui et al. 2019)."""
    present = counts > 0
    weights = torch.where(present, (1 - 0.9999) / (1 - 0.9999**counts), 0)
    weights = weights * present.sum() / weights.sum()
    return (weights[y] * F.cross_entropy(logits, y, reduction="none")).mean()


def distillation(logits: Tensor, teacher: Tensor, known: Tensor, temperature: float) -> Tensor:
    """Scalar: batch mean of KL(softmax(teacher / T) || softmax(logits / T)) over the classes ``known`` (bool [C]).

    logits, teacher: float [N, C]. Without Hinton's factor T^2, as Learning without Forgetting (Li and Hoiem, ECCV 2016,
    eq. 2 up to the teacher's entropy, which has no gradient), Mammoth and Avalanche have it. Exactly 0 where nothing is known.
    """
    classes = teacher.shape[1]
    if classes < logits.shape[1]:  # the head has grown since, and the teacher says nothing of new classes
        logits, known = logits[:, :classes], known[:classes]
    p = F.log_softmax(only(teacher / temperature, known), 1)
    q = F.log_softmax(only(logits / temperature, known), 1)
    return torch.where(known, p.exp() * (p - q), 0).sum(1).mean()


def only(logits: Tensor, keep: Tensor) -> Tensor:
    """[N, C] logits, very negative where ``keep`` (bool, broadcast) is not set, so that softmax gives 0 there.

    Finite: minus infinity would make NaN of softmax * log softmax, and of a row in which nothing is kept.
    """
    return torch.where(keep, logits, torch.finfo(logits.dtype).min / 2)


LOSSES: dict[str, Loss] = {
    f.__name__: f for f in (ce, ball, ball_prior, ball_negative, balanced_softmax, class_balanced)
}
