"""Images that stay encoded, and torchvision's recipe for photographs: the references are torchvision and Pillow themselves."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from support.photographs import SIDE, files, opened, seeded
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms import functional as by_pillow
from torchvision.transforms.v2 import functional as by_tensor

from lifequant.data import photographs
from lifequant.data.augment import random_boxes
from lifequant.data.decode import decode_whole


def as_pillow(path: Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def test_pixels_are_pillows(photos):
    """Whoever decodes them: torchvision most JPEGs, Pillow the rest."""
    for name in files(photos):
        pixels, done = decode_whole(photos.images / name)
        assert (pixels == np.asarray(as_pillow(photos.images / name))).all(), name
        assert (done is None) == any(kind in name for kind in ("plain", "progressive", "small")), (name, done)


def test_crops(photos):
    """Parts of the whole photograph: torchvision's resized_crop of a tensor to the bit, of a Pillow image within two levels."""
    store, rows = opened(photos), torch.arange(8).repeat(4)
    found = store.crops(rows, seeded())
    boxes, mirrored = random_boxes(32, *store.sizes[rows].unbind(1), seeded(), 0.08)
    assert found.shape == (32, 3, SIDE, SIDE) and found.dtype == torch.uint8 and 5 < mirrored.sum() < 27
    for row, after, box, flip in zip(rows, found, boxes.tolist(), mirrored, strict=True):
        image = as_pillow(photos.images / files(photos)[row])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        expected = by_tensor.resized_crop(pixels, *box, [SIDE, SIDE], antialias=True)
        assert torch.equal(after, expected.flip(2) if flip else expected)
        other = by_pillow.resized_crop(image, *box, [SIDE, SIDE], InterpolationMode.BILINEAR)
        other = torch.from_numpy(np.array(other)).permute(2, 0, 1)
        assert ((other.flip(2) if flip else other).int() - after.int()).abs().max() <= 2


def test_middle(photos):
    """torchvision's Resize to 256 / 224 of the size, and CenterCrop: as a run's evaluation, a loaded model and a Pillow image
    give it."""
    store, (size, resize) = opened(photos), (SIDE, 27)
    for row, name in enumerate(files(photos)):
        image = as_pillow(photos.images / name)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        expected = by_tensor.center_crop(by_tensor.resize(pixels, [resize], antialias=True), [size, size])
        assert torch.equal(store[row], expected)
        assert torch.equal(photographs.as_evaluated(photos.images / name, size, resize), expected)
        assert torch.equal(photographs.as_evaluated(Image.open(photos.images / name), size, resize), expected)
        other = CenterCrop(size)(Resize(resize)(image))
        assert (torch.from_numpy(np.array(other)).permute(2, 0, 1).int() - expected.int()).abs().max() <= 2
    assert photographs.shorter_side("reference", 224) == 256 and photographs.shorter_side("auto", 224) == 224


def test_boxes_of_other_shapes():
    """Of areas and shapes as torchvision draws them, inside each image; where none fits, torchvision's middle."""
    height, width = torch.tensor([[375, 500], [500, 333], [100, 100]]).repeat(2000, 1).unbind(1)
    boxes, _ = random_boxes(6000, height, width, seeded(), 0.08)
    top, left, rows, columns = boxes.unbind(1)
    assert (boxes >= 0).all() and (top + rows <= height).all() and (left + columns <= width).all()
    area, ratio = (rows * columns / (height * width)).view(-1, 3), (columns / rows).log().view(-1, 3)
    assert (area.min(0).values < 0.09).all() and (area.max(0).values > 0.85).all()
    assert (ratio.exp().min(0).values < 0.78).all() and (ratio.exp().max(0).values > 1.28).all()
    assert ((area < 0.5).double().mean(0) > 0.45).all()  # uniform, less the large ones that do not fit
    assert random_boxes(1, 8, 80, seeded(), 1.0)[0].tolist() == [[0, 34, 8, 11]]
    assert random_boxes(1, 80, 8, seeded(), 1.0)[0].tolist() == [[34, 0, 11, 8]]


def test_any_number_of_threads(photos, monkeypatch):
    """And wherever the photographs are held: the same bits."""
    rows, found = torch.arange(8).repeat(2), []
    for cores, more in ((1, {}), (4, {}), (4, {"held": False}), (4, {"pixels": True})):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        if more.get("pixels"):
            more = {"pixels": [decode_whole(photos.images / name)[0] for name in files(photos)], "held": False}
        store = opened(photos, **more)
        assert store.pool._max_workers == cores
        found.append((store.crops(rows, seeded()), store[rows]))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
