"""Augmentation of a whole batch on its device: zero-pad by 4, random crop, random horizontal flip (He et al. 2016)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# CIFAR-10's channel statistics, used for every data set: a source model and its successor must see the same scale.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


def normalise(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] in 0..255 -> float32, channels-last."""
    mean, std = _statistics(images.device)
    return images.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """MEAN and STD on a device, sent there once: a tensor made from numbers waits for the GPU."""
    with torch.inference_mode(False):  # an evaluation may ask first
        return tuple(torch.tensor(values).view(1, 3, 1, 1).to(device) for values in (MEAN, STD))


def send(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``. From pinned memory, so that the GPU's queue goes on and nothing waits."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def crop_and_flip(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """uint8 [N, C, H, W] -> the same shape: each image cropped at its own offset after zero padding, half of them mirrored.

    The randomness comes from ``generator`` (on the CPU) alone, so a batch is the same on every device.
    """
    n, channels, height, width = images.shape
    offsets = send(torch.randint(0, 2 * pad + 1, (2, n), generator=generator), images.device)
    mirrored = send(torch.rand(n, generator=generator) < 0.5, images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device).expand(n, width)
    columns = offsets[1, :, None] + torch.where(mirrored[:, None], width - 1 - across, across)
    image = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return F.pad(images, (pad, pad, pad, pad))[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
