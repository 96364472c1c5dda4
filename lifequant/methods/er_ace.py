"""Experience replay with asymmetric cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from lifequant.losses import only
from lifequant.methods.base import Batch, LifelongMethod
from lifequant.registry import register


@register("method", "er_ace")
class ERACE(LifelongMethod):
    """Replay; of a new image only the logits of classes present among the batch's new images take part in the loss, so
    that new classes do not push the old ones down; replay images use all (Caccia et al., ICLR 2022, eq. 4).

    The loss of the whole batch is one mean, that of ``--loss`` on the masked logits; the paper adds two means.
    """

    splits = False  # which classes are present depends on the whole batch
    help = "replay with asymmetric cross entropy (Caccia et al., ICLR 2022)"
    parts = LifelongMethod.parts | {"replay": True}

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        classes = torch.arange(logits.shape[1], device=logits.device)
        present = ((batch.y[:, None] == classes) & ~batch.is_replay[:, None]).any(0)
        return super().task_loss(only(logits, batch.is_replay[:, None] | present), batch)
