"""In which order images of a class are kept: iCaRL's herding, and by their loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def herding(features: Tensor, most: int) -> list[int]:
    """The first ``most`` of ``features`` [N, D] of one class: with each next one, the mean of those taken comes as near as it
    can to the mean of all (iCaRL, Rebuffi et al., CVPR 2017, algorithm 4; of equal ones the first).

    Features are L2-normalized, as the paper has them; the means are not normalized again. In float64, on the CPU.
    """
    f = F.normalize(features.double().cpu(), dim=1)
    mean, total = f.mean(0), torch.zeros(f.shape[1], dtype=torch.float64)
    left = torch.zeros(len(f), dtype=torch.float64)  # minus infinity once taken
    taken: list[int] = []
    for k in range(1, min(most, len(f)) + 1):
        # |mean - (total + f) / k|^2 = (|f|^2 - 2 f.(k mean - total)) / k^2 + what is the same for all
        nearness = 2 * f @ (k * mean - total) - f.square().sum(1) + left
        best = int(nearness.argmax())
        taken.append(best)
        left[best] = -torch.inf
        total += f[best]
    return taken


def by_loss(losses: Tensor, uniform: Sequence[float]) -> list[int]:
    """All indices of ``losses`` [N] in the order of a draw without replacement, each time with probability proportional to
    the loss; ``uniform`` are N numbers in (0, 1), the chance (Efraimidis and Spirakis 2006).

    Images of high loss are rather kept, as in loss-aware reservoir sampling (Buzzega et al., ICPR 2020, "Rethinking
    experience replay"), but not they alone, which would be outliers and wrong labels.
    """
    keys = [math.log(u) / max(loss, 1e-12) for u, loss in zip(uniform, losses.double().tolist(), strict=True)]
    return sorted(range(len(keys)), key=lambda index: -keys[index])
