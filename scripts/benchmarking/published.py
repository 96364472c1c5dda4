"""The scheme of LifeQuant's published code as a plain baseline, written anew: what its parts cost, not its results.

Rounding is an autograd.Function called by a module in every layer, all in float32, NCHW and eager; the penalty is a loop
over named parameters; loss and accuracy are read (``.item()``) at every step; images are PNG files that a DataLoader with
one worker opens by PIL and augments by torchvision. Weights are Q_k((w - mean) / std / 2), Q_k(x) = round(x n) / n, n =
2^k - 1, not clamped; activations Q_k(clamp(x, 0, 1)), our choice. The network is ours: ResNet with shortcuts of option A.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from lifequant import registry
from lifequant.data.augment import CIFAR

CLASSES = 10
FILES = 1024
EDGE_BITS = 8
SETTLE_SECONDS = 0.3  # after a turn the loader's worker fills its queue; the next contender must not feel it


class Round(torch.autograd.Function):
    """Q_k forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        parts = 2**bits - 1
        return torch.round(x * parts) / parts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class WeightRounding(nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return Round.apply((weight - weight.mean()) / weight.std() / 2, self.bits)


class RoundedConv(nn.Conv2d):
    def __init__(self, cin: int, cout: int, kernel: int, stride: int, bits: int) -> None:
        super().__init__(cin, cout, kernel, stride, kernel // 2, bias=False)
        self.rounding = WeightRounding(bits)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.rounding(self.weight), None, self.stride, self.padding)


class RoundedLinear(nn.Linear):
    def __init__(self, cin: int, cout: int, bits: int) -> None:
        super().__init__(cin, cout)
        self.rounding = WeightRounding(bits)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.rounding(self.weight), self.bias)


class RoundedReLU(nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return Round.apply(torch.clamp(x, 0, 1), self.bits)


class Scheme:
    """Answers a model's builder (lifequant.quantizers.layers.Scheme)."""

    def conv(self, cin: int, cout: int, kernel: int, stride: int = 1, edge: bool = False) -> nn.Module:
        return RoundedConv(cin, cout, kernel, stride, EDGE_BITS if edge else 4)

    def linear(self, cin: int, cout: int, edge: bool = False) -> nn.Module:
        return RoundedLinear(cin, cout, EDGE_BITS if edge else 4)

    def relu(self) -> nn.Module:
        return RoundedReLU(4)


class Files(Dataset):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(*CIFAR),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), index % CLASSES


def write_images(folder: Path, count: int) -> list[Path]:
    """Random PNG files of 32x32 pixels."""
    noise = np.random.default_rng(0)
    paths = [folder / f"{index:05d}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return paths


class Published:
    """``seconds(steps)`` trains for so many steps."""

    def __init__(self, model: str, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.folder = tempfile.TemporaryDirectory()
        files = Files(write_images(Path(self.folder.name), FILES))
        endless = RandomSampler(files, replacement=True, num_samples=10**9)  # so that the worker is started once
        self.loader = DataLoader(files, batch, sampler=endless, num_workers=1)
        self.batches = iter(self.loader)
        self.model = registry.model(model)(CLASSES, Scheme()).to(device)
        self.former = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.importance = {name: torch.rand_like(p) for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        images, labels = images.to(self.device), labels.to(self.device)
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        penalty = 0
        for name, p in self.model.named_parameters():
            penalty = penalty + (self.importance[name] * (p - self.former[name]) ** 2).sum()
        loss = loss + 0.1 * penalty
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.accuracies.append((logits.argmax(1) == labels).float().mean().item())

    def seconds(self, steps: int) -> float:
        self.model.train()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(*next(self.batches))
        taken = time.perf_counter() - begin
        time.sleep(SETTLE_SECONDS)
        return taken
