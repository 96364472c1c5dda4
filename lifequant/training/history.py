"""What grows as a run goes on, and the sums that a step leaves on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def new_history() -> dict[str, Any]:
    """What grows as a run goes on; plain values, so that a checkpoint can hold it."""
    rows: dict[str, Any] = {
        name: []
        for name in (
            "top1",
            "top5",
            "top1_masked",
            "top1_nme",
            "quantization_error",
            "tasks",
            "training",
            "oscillation",
        )
    }
    times = {"seconds": 0.0, "timed_seconds": 0.0, "timed_images": 0, "seconds_by_part": {}}
    return rows | times | {"baseline": None, "memory": {}}


def step_sums(logits: Tensor, y: Tensor, task_loss: Tensor, penalty: Tensor) -> Tensor:
    """float32 [5] on the device: task loss, penalty times lambda, top-1 and top-5 hits, images; losses times images."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
    n = len(y)
    return torch.stack(
        [
            task_loss * n,
            penalty * n,
            top[:, 0].sum().float(),
            top.sum().float(),
            torch.full((), float(n), device=y.device),
        ]
    )


def means(sums: Tensor) -> dict[str, float]:
    """The sums per image; a device synchronization."""
    task_loss, penalty, top1, top5, images = sums.tolist()
    n = max(images, 1)
    return {"loss": (task_loss + penalty) / n, "task_loss": task_loss / n, "penalty": penalty / n,
            "top1": 100 * top1 / n, "top5": 100 * top5 / n}  # fmt: skip
