"""Re-estimate BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lifequant.qat.modes import eval_mode


@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace every BatchNorm's running statistics with their plain average over ``batches``.

    ``batches`` are inputs of the model, float32 [N, 3, H, W]. Returns their number. Each batch adds its mean and its
    unbiased variance, as torch's own running statistics do. All batches have equal weight, so they should have equal
    sizes. While weights oscillate, running averages lag behind the last weights, and the lag grows as the bit-width falls
    (Nagel et al., ICML 2022). Only the BatchNorm layers run in train mode; torch's ``update_bn`` would switch dropout on.
    Nothing else in the model changes. Raises ValueError if there is no batch. After any exception the statistics have
    their former values.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    former = [(m, m.momentum, [b.clone() for b in m.buffers(recurse=False)]) for m in norms]
    count = 0
    succeeded = False
    try:
        with eval_mode(model):
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
            for batch in batches:
                count += 1
                for norm in norms:  # torch's own cumulative average, momentum=None, reads a tensor in each layer
                    norm.momentum = 1 / count
                model(batch)
        if not count:
            raise ValueError("reestimate_bn: there is no batch to estimate the statistics from")
        succeeded = True
    finally:
        for norm, momentum, buffers in former:
            norm.momentum = momentum
            for buffer, value in zip(norm.buffers(recurse=False), buffers, strict=True):
                if not succeeded or not buffer.is_floating_point():  # num_batches_tracked counts training steps only
                    buffer.copy_(value)
    return count
