"""The only place that test data reaches: accuracies and the quantization error of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lifequant.data.dataset import DataSet, Store
from lifequant.evaluation.metrics import hits
from lifequant.qat.layers import no_rounding
from lifequant.qat.modes import eval_mode
from lifequant.runtime import distributed


@dataclass
class Scores:
    """Percent, one entry a task; ``error`` is xi(s, t) of this model on each task s."""

    top1: list[float]
    top5: list[float]
    masked: list[float]
    error: list[float]


@torch.inference_mode()
def logits_of(model: nn.Module, store: Store, rows: Tensor, batch_size: int) -> Tensor:
    """float32 [len(rows), C], in eval mode, images not augmented."""
    parts = distributed.own_parts(rows.split(batch_size))
    with eval_mode(model):
        batches = store.batches(part for _, part in parts)
        found = {index: model(x) for (index, _), x in zip(parts, batches, strict=True)}
    return distributed.gather(found, rows.device)


def evaluate(model: nn.Module, data: DataSet, batch_size: int, with_error: bool = True) -> Scores:
    """Score on the test set of every task. Each test image is seen once, however many tasks it belongs to."""
    store, device = data.test, data.test.labels.device
    every = torch.arange(len(store.paths), device=device)
    logits = logits_of(model, store, every, batch_size)
    shift = torch.zeros(len(every), device=device)
    if with_error:
        with no_rounding(model):
            shift = (logits_of(model, store, every, batch_size) - logits).square().mean(1)
    scores = Scores([], [], [], [])
    for task_index, test_rows in enumerate(data.test_rows):
        rows = torch.tensor(test_rows, device=device)
        mask = torch.zeros(data.num_classes, dtype=torch.bool, device=device)
        mask[data.classes(task_index)] = True
        top1, top5, masked = (100 * hits(logits[rows], store.labels[rows], mask) / len(rows)).tolist()
        scores.top1.append(top1)
        scores.top5.append(top5)
        scores.masked.append(masked)
        scores.error.append(shift[rows].mean().item())
    return scores


def validation_top1(model: nn.Module, store: Store, rows: list[int], batch_size: int) -> float:
    """Percent, on held-out training images."""
    chosen = torch.tensor(rows, device=store.labels.device)
    logits = logits_of(model, store, chosen, batch_size)
    return 100 * (logits.argmax(1) == store.labels[chosen]).double().mean().item()
