"""BatchNorm's running statistics, estimated anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace every BatchNorm's running statistics by the plain average over ``batches``; returns how many there were.

    ``batches`` are inputs of the model, float32 [N, 3, H, W]. A batch adds its mean and its unbiased variance, as torch's
    own running statistics do; batches count alike, whatever their size, so give equal ones. Only BatchNorm is in train
    mode meanwhile. Nothing else of the model changes, and nothing is kept. While weights oscillate, running averages lag
    behind the last weights, the more the fewer the bits (Nagel et al. 2022). Raises ValueError for no batch,
    and then, or if the model raises, the statistics are as before.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    flags = [(m, m.training) for m in model.modules()]
    kept = [(m, m.momentum, [b.clone() for b in m.buffers(recurse=False)]) for m in norms]
    count = 0
    done = False
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
        for batch in batches:
            count += 1
            for norm in norms:  # the cumulative average; torch's own, momentum=None, reads a tensor in each layer
                norm.momentum = 1 / count
            model(batch)
        if not count:
            raise ValueError("reestimate_bn: no batch to take the statistics from")
        done = True
    finally:
        for norm, momentum, buffers in kept:
            norm.momentum = momentum
            for buffer, former in zip(norm.buffers(recurse=False), buffers, strict=True):
                if not done or not buffer.is_floating_point():  # num_batches_tracked goes on counting training steps
                    buffer.copy_(former)
        for module, training in flags:
            module.training = training
    return count
