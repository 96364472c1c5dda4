"""Images that are not held decoded: as their files' bytes, decoded by a pool of threads whenever rows are asked for.

Both classes stand where the uint8 tensor of all images stands else: ``images[rows]``, ``shape``, ``device``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lifequant.common.errors import UserError
from lifequant.data.augment import random_boxes
from lifequant.data.decode import as_pixels, decode, decode_whole, read_file, silence, upright


class EncodedImages:
    """uint8 [N, 3, size, size], bit for bit what ``load_images`` gives for these files, but decoded for each request.

    ``held``: the files are read once, and their bytes kept in memory. Else a file is read whenever it is needed.
    Requests raise UserError for a file that can't be decoded.
    """

    device, dtype = torch.device("cpu"), torch.uint8

    def __init__(self, root: Path, paths: Sequence[str], size: int, held: bool) -> None:
        silence()
        self.files = [root / path for path in paths]
        self.shape = torch.Size((len(paths), 3, size, size))
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1, "decode")  # the decoders release the GIL
        self.contents = list(self.pool.map(read_file, self.files)) if held else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: int | Tensor) -> Tensor:
        """uint8 [3, size, size] of an image, or [n, 3, size, size] of n, in channels-last memory."""
        return self[torch.tensor([rows])][0] if isinstance(rows, int) else self._stack(self.view, rows.tolist())

    def view(self, row: int) -> np.ndarray:
        """uint8 [size, size, 3]: an image as it is evaluated."""
        content = self.contents and self.contents[row]
        return decode(self.files[row], self.shape[-1], content)[0].permute(1, 2, 0).numpy()

    def _stack(self, make: Callable[..., np.ndarray], *items: Sequence) -> Tensor:
        """uint8 [n, 3, size, size], of n calls ``make(item, ...)``. Threads copy by numpy: torch would have each of them
        begin threads of its own."""
        size = self.shape[-1]
        whole = np.empty((len(items[0]), size, size, 3), np.uint8)

        def one(index: int, *item: object) -> None:
            whole[index] = make(*item)

        for _ in self.pool.map(one, range(len(whole)), *items):
            pass  # raises what a thread has raised
        return torch.from_numpy(whole).permute(0, 3, 1, 2)


class Photographs(EncodedImages):
    """Images of any size and shape, seen as torchvision's reference recipe for ImageNet sees them (``--augment reference``).

    ``images[rows]`` has the middle of each, ``crops`` random parts for training, both taken from the whole photograph.
    ``sizes``: int64 [N, 2], height and width of each. ``least``: the smallest part, as a share of the photograph's area.
    ``pixels``: all of them decoded, if memory has the room.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        size: int,
        held: bool,
        sizes: Tensor,
        least: float,
        pixels: Sequence[np.ndarray] | None = None,
    ) -> None:
        super().__init__(root, paths, size, held)
        self.sizes, self.least, self.pixels = sizes, least, pixels
        self._known = [tuple(size) for size in sizes.tolist()]

    def photograph(self, row: int) -> np.ndarray:
        """uint8 [H, W, 3], the whole."""
        if self.pixels is not None:
            return self.pixels[row]
        found = decode_whole(self.files[row], self.contents and self.contents[row])[0]
        if found.shape[:2] != self._known[row]:
            raise UserError(f"{self.files[row]}: this image has changed since the run began: begin anew, or resume")
        return found

    def view(self, row: int) -> np.ndarray:
        size = self.shape[-1]
        return middle(self.photograph(row), size, shorter_side("reference", size))

    def crops(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [n, 3, size, size], in channels-last memory: of each image a part of random place, size and shape, scaled to
        size x size, half of them mirrored (RandomResizedCrop and RandomHorizontalFlip). All that is random comes from
        ``generator`` before a thread begins."""
        height, width = self.sizes[rows].unbind(1)
        boxes, mirrored = random_boxes(len(rows), height, width, generator, self.least)
        return self._stack(self.crop, rows.tolist(), boxes.tolist(), mirrored.tolist())

    def crop(self, row: int, box: Sequence[int], mirrored: bool) -> np.ndarray:
        """uint8 [size, size, 3]: the ``box`` (top, left, height, width) of an image."""
        top, left, height, width = box
        part = self.photograph(row)[top : top + height, left : left + width]
        found = scaled(part, self.shape[-1], self.shape[-1])
        return found[:, ::-1] if mirrored else found


def scaled(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] of [H, W, 3], bilinear, with antialiasing, as torchvision's ``resize`` of a uint8 tensor."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def shorter_side(augment: str, size: int) -> int:
    """To how many pixels evaluation scales an image's shorter side before it takes the middle of size x size: in the
    reference recipe 256 for 224."""
    return round(size * 256 / 224) if augment == "reference" else size


def middle(pixels: np.ndarray, size: int, resize: int) -> np.ndarray:
    """uint8 [size, size, 3] of [H, W, 3]: the shorter side scaled to ``resize``, and the center of that (torchvision's Resize
    and CenterCrop)."""
    height, width = (int(resize * side / min(pixels.shape[:2])) for side in pixels.shape[:2])
    top, left = round((height - size) / 2), round((width - size) / 2)
    return scaled(pixels, height, width)[top : top + size, left : left + size]


def as_evaluated(image: Path | Image.Image, size: int, resize: int) -> Tensor:
    """uint8 [3, size, size] of a file or an image, as a run's evaluation sees it; ``resize`` as ``shorter_side`` gives it.
    Raises UserError for a file that can't be decoded."""
    opened = isinstance(image, Image.Image)
    if resize == size:
        return (as_pixels(image, size) if opened else decode(image, size))[0]
    pixels = np.array(upright(image)[0]) if opened else decode_whole(image)[0]
    return torch.from_numpy(middle(pixels, size, resize)).permute(2, 0, 1)
