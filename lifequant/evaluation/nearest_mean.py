"""Nearest mean of exemplars: classify by features instead of the head (iCaRL, Rebuffi et al., CVPR 2017, algorithm 1).

Features follow the network, the head's weights needn't; so it is spared the head's leaning to the last task's classes.
Class means are computed when they are needed and not kept: the method costs no bytes beyond the exemplars'.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant.data.augment import ready
from lifequant.data.codec import CodedImages
from lifequant.data.dataset import DataSet, Store
from lifequant.data.image_storage import take
from lifequant.qat.modes import eval_mode


def last_linear(model: nn.Module) -> nn.Linear:
    """The model's last linear layer, its head. Raises ValueError where there is none."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer that could be its head")
    return linear[-1]


@torch.no_grad()
def features(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """float32 [N, D]: the head's input, before its quantizer, for all images of ``batches`` (inputs of the model, in
    eval mode)."""
    parts: list[Tensor] = []
    handle = last_linear(model).register_forward_pre_hook(lambda module, args: parts.append(args[0].detach()))
    try:
        with eval_mode(model):
            for batch in batches:
                model(batch)
    finally:
        handle.remove()
    return torch.cat(parts)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """float32 [C, D]: each class's mean of L2-normalized ``features`` [N, D], normalized again; 0 for an absent class."""
    member = F.one_hot(labels, num_classes).double()  # a product, which adds in a fixed order on every device
    return F.normalize(member.T @ F.normalize(features.double(), dim=1), dim=1).float()


def nme_predict(features: Tensor, means: Tensor, present: Tensor) -> Tensor:
    """int64 [N]: for each of ``features`` [N, D], L2-normalized here, the class with the nearest of ``means`` [C, D] among
    those ``present`` (bool [C]); of equal distances the lowest class."""
    # |f - m|^2 = |f|^2 - 2 f.m + |m|^2, and |f|^2 is the same for all classes
    distance = means.square().sum(1) - 2 * F.normalize(features, dim=1) @ means.T
    return distance.masked_fill(~present, torch.inf).argmin(1)


def nme_hits(features: Tensor, labels: Tensor, means: Tensor, present: Tensor) -> Tensor:
    """bool [N]: whether the nearest mean of exemplars is the one of the image's class."""
    return nme_predict(features, means, present) == labels


@torch.inference_mode()
def nme_accuracy(
    model: nn.Module,
    data: DataSet,
    rows: Tensor | Sequence[int],
    batch_size: int,
    coded: CodedImages | None = None,
) -> list[float]:
    """Percent on each task's test set, by the exemplars ``rows`` (training rows, at least one), as ``coded`` has them.

    Each test image is passed once, however many tasks it belongs to. Raises ValueError for no exemplar.
    """
    device = data.test.labels.device
    rows = torch.as_tensor(rows, dtype=torch.int64, device=device)
    if not len(rows):
        raise ValueError("nearest mean of exemplars: there is no exemplar")
    labels = data.train.labels[rows]
    means = class_means(_of_store(model, data.train, rows, batch_size, coded), labels, data.num_classes)
    present = torch.bincount(labels, minlength=data.num_classes) > 0
    every = torch.arange(len(data.test.labels), device=device)
    right = nme_hits(_of_store(model, data.test, every, batch_size), data.test.labels, means, present).double()
    return [100 * right[torch.tensor(task, device=device)].mean().item() for task in data.test_rows]


def _of_store(
    model: nn.Module, store: Store, rows: Tensor, batch_size: int, coded: CodedImages | None = None
) -> Tensor:
    parts = rows.split(batch_size)
    if coded is None:
        return features(model, store.batches(parts))
    taken = (coded.over(take(store.images, part, part.device), part) for part in parts)
    return features(model, (ready(batch, batch.device, store.statistics) for batch in taken))
