"""The head alone, trained anew on as many images of each class, after the whole network (decoupled training, Kang et al.,
ICLR 2020, "classifier re-training", here from the head's present weights; balanced fine-tuning in End-to-End
Incremental Learning, Castro et al., ECCV 2018)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant.data.task import Task
from lifequant.evaluation.nearest_mean import features, last_linear

MOMENTUM = 0.9


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [N], on the CPU: N rows in ``labels`` [N], drawn with replacement, each class as likely as any other."""
    labels = labels.cpu()
    weights = 1 / torch.bincount(labels).double()
    return torch.multinomial(weights[labels], len(labels), replacement=True, generator=generator)


def train_head(
    model: nn.Module, task: Task, epochs: int, batch_size: int, lr: float, generator: torch.Generator
) -> None:
    """Train weight and bias of the model's last linear layer, in place, on the task's pool (new and replay images).

    An epoch is as many class-balanced draws as the pool has images. Plain cross entropy; SGD with momentum 0.9, no weight
    decay, learning rate from ``lr`` by a cosine to 0 over all epochs. The head's inputs are computed once, of images not
    augmented, in eval mode, so only the head's own quantizers are in the path; their steps, and all else of the model,
    stay bit for bit. All that is random comes from ``generator``. Keeps no bytes; meanwhile 4 D of them a pool image.
    """
    labels = task.labels[task.pool]
    inputs = features(model, (task.batch(rows)[0] for rows in task.pool.split(batch_size)))
    head = last_linear(model)
    learned = [p for p in (head.weight, head.bias) if p is not None]
    optimizer = torch.optim.SGD(learned, lr=lr, momentum=MOMENTUM)
    steps = epochs * -(-len(labels) // batch_size)
    step = 0
    for _ in range(epochs):
        for rows in balanced_order(labels, generator).to(labels.device).split(batch_size):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            loss = F.cross_entropy(head(inputs[rows]), labels[rows])
            for p, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                p.grad = gradient  # of these alone: the quantizers' steps get none
            optimizer.step()
            step += 1
    optimizer.zero_grad()
