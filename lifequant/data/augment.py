"""Augmentation of a whole batch on its device: a random crop, and a random horizontal flip.

Small images: zero-pad by 4 and crop (He et al. 2016). Larger ones: a part of random size and shape, scaled up to the
whole ("Inception-style", Szegedy et al., CVPR 2015; RandomResizedCrop in torchvision and timm).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lifequant import registry
from lifequant.config import Config
from lifequant.data.image_storage import send, take


class Statistics(NamedTuple):
    """Of the channels of images in 0 to 1, by which a network's input is normalized."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# They follow the network and not the data set, since a source model and its successor must see the same scale.
CIFAR = Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # of CIFAR-10's training images
IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # as torchvision's weights want it

PADDED_UP_TO = 64  # pixels a side: a shift by 4 changes a small image, but hardly a large one
RATIO = 3 / 4, 4 / 3  # width over height of a resized crop, as torchvision's
ATTEMPTS = 10  # at a crop that fits the image, as torchvision's
_ONE = 1 << 15  # weights of an interpolation are whole multiples of 1/_ONE


def augmentation(config: Config) -> Callable[[Tensor, torch.Generator], Tensor]:
    """What ``--augment`` names."""
    if config.augment == "crop" or (config.augment == "auto" and config.image_size <= PADDED_UP_TO):
        return crop_and_flip
    return partial(resized_crop_and_flip, least=config.crop_scale)


def statistics_of(config: Config) -> Statistics:
    """Those of the config's network."""
    return CIFAR if config.target_model in registry.names("model") else IMAGENET


def normalize(images: Tensor, statistics: Statistics = CIFAR) -> Tensor:
    """uint8 [N, 3, H, W] in 0..255 -> float32, channels-last."""
    mean, std = _on_device(statistics, images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(mean).div_(std)


def ready(batch: Tensor, device: torch.device, statistics: Statistics = CIFAR) -> Tensor:
    """float32 on ``device``, as the model takes it. Bytes are normalized there; other images are ready already."""
    batch = send(batch, device)
    return normalize(batch, statistics) if batch.dtype == torch.uint8 else batch


def load_batch(images: Tensor, rows: Tensor, device: torch.device, statistics: Statistics = CIFAR) -> Tensor:
    """float32 [N, ...]: these rows of the images on ``device``, not augmented, as the model takes them.

    Bytes are normalized; other images are ready for the model already.
    """
    return ready(take(images, rows, device), device, statistics)


@cache
def _on_device(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """(mean, std) on a device, sent there once: a tensor made from numbers waits for the GPU."""
    with torch.inference_mode(False):  # an evaluation may ask first
        return tuple(torch.tensor(values).view(1, 3, 1, 1).to(device) for values in statistics)


@cache
def _counted(n: int, device: torch.device) -> Tensor:
    """0 to n - 1 on a device, made once."""
    with torch.inference_mode(False):
        return torch.arange(n, device=device)


def crop_and_flip(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """uint8 [N, C, H, W] -> the same shape: each image cropped at its own offset after zero padding, half of them mirrored.

    The randomness comes from ``generator`` (on the CPU) alone, so a batch is the same on every device.
    """
    n, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    across = torch.arange(width)
    columns = left + torch.where(mirrored, width - 1 - across, across)
    pixels = send(torch.cat([top + torch.arange(height), columns], 1), images.device)  # of both, in one copy to a GPU
    rows, columns = pixels[:, None, :height, None], pixels[:, None, None, height:]
    image, channel = _counted(n, images.device), _counted(channels, images.device)
    return F.pad(images, (pad, pad, pad, pad))[image[:, None, None, None], channel[:, None, None], rows, columns]


def resized_crop_and_flip(images: Tensor, generator: torch.Generator, least: float = 0.35) -> Tensor:
    """uint8 [N, C, H, W] -> the same shape: of each image a part, scaled to the whole, half of them mirrored.

    The part's area is uniform in ``least`` to 1 of the image's, the log of its width over height uniform in RATIO.
    ``least`` is larger than ImageNet's 0.08: with some thousand images and short trainings, parts of a tenth rarely show
    what the label names. Bilinear. The randomness comes from ``generator`` (on the CPU) alone, as many draws an image, and
    the interpolation is exact up to its rounding: an image's result is the same on every device and however a batch is split.
    """
    n, _, height, width = images.shape
    boxes, mirrored = random_boxes(n, height, width, generator, least)
    top, left, rows, columns = boxes.double().unbind(1)
    across = torch.arange(width, dtype=torch.float64).expand(n, width)
    across = torch.where(mirrored[:, None], width - 1 - across, across)
    down = torch.arange(height, dtype=torch.float64).expand(n, height)
    images = _resample(images, _sources(down, top, rows, height), 2)
    return _resample(images, _sources(across, left, columns, width), 3)


def random_boxes(
    n: int, height: int | Tensor, width: int | Tensor, generator: torch.Generator, least: float
) -> tuple[Tensor, Tensor]:
    """(int64 [n, 4] of top, left, height and width, bool [n] whether mirrored), on the CPU. ``height`` and ``width`` are of
    all images, or int64 [n]. Where no attempt fits, the middle as far as RATIO allows, as torchvision's."""
    draws = torch.rand(n, 2 * ATTEMPTS + 3, generator=generator, dtype=torch.float64)
    height, width = (torch.as_tensor(side, dtype=torch.float64).expand(n) for side in (height, width))
    area = (height * width)[:, None] * (least + (1 - least) * draws[:, :ATTEMPTS])
    low, high = map(math.log, RATIO)
    ratio = torch.exp(low + (high - low) * draws[:, ATTEMPTS : 2 * ATTEMPTS])
    columns, rows = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (columns <= width[:, None]) & (rows <= height[:, None]) & (columns > 0) & (rows > 0)
    first = fits.long().argmax(1, keepdim=True)
    some = fits.any(1)
    rows, columns = rows.gather(1, first)[:, 0], columns.gather(1, first)[:, 0]
    rows = torch.where(some, rows, torch.minimum(height, (width / RATIO[0]).round()))
    columns = torch.where(some, columns, torch.minimum(width, (height * RATIO[1]).round()))
    top = (draws[:, -3] * (height - rows + 1)).floor()
    left = (draws[:, -2] * (width - columns + 1)).floor()
    top, left = (
        torch.where(some, place, ((whole - part) / 2).floor())
        for place, whole, part in ((top, height, rows), (left, width, columns))
    )
    return torch.stack([top, left, rows, columns], 1).long(), draws[:, -1] < 0.5


def _sources(positions: Tensor, start: Tensor, length: Tensor, whole: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pixel below, pixel above, the latter's weight times _ONE), int64 [N, whole], for output ``positions`` [N, whole]."""
    source = (positions + 0.5) * (length / whole)[:, None] - 0.5
    source = source.clamp(min=0).minimum(length[:, None] - 1) + start[:, None]
    below = source.floor()
    above = torch.minimum(below + 1, (start + length - 1)[:, None])
    return below.long(), above.long(), ((source - below) * _ONE).round().long()


def _resample(images: Tensor, sources: tuple[Tensor, Tensor, Tensor], dim: int) -> Tensor:
    """uint8 [N, C, H, W], each pixel along ``dim`` a mean of two pixels."""
    if images.device.type == "cpu":  # image by image takes half the time of a gather
        return torch.stack([_resample_one(*of_one, dim - 1) for of_one in zip(images, *sources, strict=True)])
    shape = [len(images), 1, 1, 1]
    shape[dim] = -1
    below, above, weight = (send(s, images.device).view(shape) for s in sources)
    below, above = (images.gather(dim, index.expand(images.shape)).float() for index in (below, above))
    return below.lerp_(above, weight.float() / _ONE).add_(0.5).byte()  # 8 and 15 bits: exact in float32's 24


def _resample_one(image: Tensor, below: Tensor, above: Tensor, weight: Tensor, dim: int) -> Tensor:
    """The same of uint8 [C, H, W]."""
    weight = (weight.float() / _ONE).view([-1, 1] if dim == 1 else [-1])
    below, above = (image.index_select(dim, index).float() for index in (below, above))
    return below.lerp_(above, weight).add_(0.5).byte()
