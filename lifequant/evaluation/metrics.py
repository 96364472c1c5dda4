"""What is said of a run: pure functions of the accuracy matrix and of weights.

R[t][i] is the accuracy in percent on task i's test set after training task t; every row has an entry for each task.
Our definitions, and others': Mammoth and PyCIL take the maximum of forgetting over all rows (never negative), Avalanche
the accuracy just after learning; Mammoth's FWT baseline is the trained model; PyCIL's "average accuracy" is the
incremental one. What is undefined (one task, one row) is None.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Matrix = Sequence[Sequence[float]]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def average_accuracy(R: Matrix) -> float | None:
    """mean_i R[last][i]: tasks count alike."""
    return _mean(R[-1]) if len(R) else None


def average_accuracy_weighted(R: Matrix, test_images: Sequence[int]) -> float | None:
    """The same, weighted by each task's test images; overlapping tasks make the two differ."""
    return float(np.average(R[-1], weights=test_images)) if len(R) else None


def average_incremental_accuracy(R: Matrix) -> float | None:
    """mean over t of mean_{i<=t} R[t][i] (Rebuffi et al. 2017)."""
    return _mean([float(np.mean(row[: t + 1])) for t, row in enumerate(R)]) if _sequential(R) else None


def forgetting(R: Matrix) -> float | None:
    """mean_{i<T-1} (max_{i<=t<T-1} R[t][i] - R[T-1][i]), in points (Chaudhry et al. 2018; we count from t = i)."""
    return _mean(forgetting_of_tasks(R)) if _sequential(R) else None


def forgetting_of_tasks(R: Matrix) -> list[float]:
    """The same for each task i before the last row's, also where R has not all of its rows yet."""
    return [best - R[-1][i] for i, best in _bests(R)]


def forgetting_rate(R: Matrix) -> float | None:
    """Forgetting relative to that maximum, in percent; a task whose maximum is 0 has none to lose and is left out."""
    return _mean([100 * (best - R[-1][i]) / best for i, best in _bests(R) if best > 0]) if _sequential(R) else None


def bwt(R: Matrix) -> float | None:
    """Backward transfer: mean_{i<T-1} R[T-1][i] - R[i][i] (Lopez-Paz & Ranzato 2017)."""
    return _mean([R[-1][i] - R[i][i] for i in range(len(R) - 1)]) if _sequential(R) else None


def fwt(R: Matrix, baseline: Sequence[float]) -> float | None:
    """Forward transfer: mean_{i>0} R[i-1][i] - b_i, b_i a randomly initialized model's accuracy (Lopez-Paz & Ranzato 2017)."""
    return _mean([R[i - 1][i] - baseline[i] for i in range(1, len(R))]) if _sequential(R) else None


def _sequential(R: Matrix) -> bool:
    """Whether the matrix has a row for each task, as a sequence has and a joint training has not."""
    return len(R) > 0 and len(R) == len(R[0])


def _bests(R: Matrix) -> list[tuple[int, float]]:
    return [(i, max(row[i] for row in R[i:-1])) for i in range(len(R) - 1)]


def hits(logits: Tensor, y: Tensor, classes: Tensor) -> Tensor:
    """int64 [3]: how many of [N, C] logits are right in top-1, in top-5, and in top-1 among the task's ``classes`` [C] (bool)."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
    masked = logits.masked_fill(~classes, -torch.inf).argmax(1) == y
    return torch.stack([top[:, 0].sum(), top.any(1).sum(), masked.sum()])


def space_shift(snapshots: Sequence[dict[str, Tensor]]) -> dict[str, list[list[float]]]:
    """{layer: T x T}, RMSE between the quantized weights at the end of tasks s and t (LifeQuant's quantization space shift)."""

    def rmse(a: Tensor, b: Tensor) -> float:
        return (a - b).square().mean().sqrt().item()

    layers = snapshots[0] if snapshots else {}
    return {name: [[rmse(a[name], b[name]) for b in snapshots] for a in snapshots] for name in layers}


def step_change(steps: Sequence[dict[str, float]]) -> dict[str, list[list[float]]]:
    """{layer: T x T}, relative change of a weight step from the end of task s (row) to that of task t (column)."""
    layers = steps[0] if steps else {}
    return {name: [[b[name] / a[name] - 1 for b in steps] for a in steps] for name in layers}
