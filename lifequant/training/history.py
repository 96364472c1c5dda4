"""What grows as a run goes on, and the sums that a step leaves on the device."""

from __future__ import annotations

from collections.abc import Sequence
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


def step_sums(logits: Tensor, y: Tensor, terms: Tensor) -> Tensor:
    """float32 [len(terms) + 3] on the device: each loss term times the images, top-1 hits, top-5 hits, images.

    logits [N, C], y int64 [N], terms [T]. Nothing waits for the device.
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
    n = len(y)
    hits = [top[:, 0].sum().float(), top.sum().float(), torch.full((), float(n), device=y.device)]
    return torch.cat([terms * n, torch.stack(hits)])


def means(sums: Tensor, names: Sequence[str]) -> dict[str, float]:
    """{"loss": all terms together, then each term by its name, "top1", "top5" in percent}: means over images.

    ``sums`` are added up from ``step_sums``; ``names`` are the terms' names in their order. Waits for the device.
    """
    *terms, top1, top5, images = sums.tolist()
    n = max(images, 1)
    by_name = {name: term / n for name, term in zip(names, terms, strict=True)}
    return {"loss": sum(terms) / n, **by_name, "top1": 100 * top1 / n, "top5": 100 * top5 / n}
