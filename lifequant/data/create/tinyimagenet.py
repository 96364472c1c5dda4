"""Tiny ImageNet (Stanford's cs231n): 200 classes of 64x64 pixels, 500 training and 50 validation images each.

Its archive has train/<wnid>/images/<wnid>_0.JPEG, and val/images/val_0.JPEG with the classes in val/val_annotations.txt. The
validation images are what is tested on, as usual; the images of test/ have no labels and are left out.
"""

from __future__ import annotations

import re

from lifequant.common.errors import UserError
from lifequant.common.safe_files import short
from lifequant.data.create import official
from lifequant.data.create.archives import Source
from lifequant.data.create.prepared import Contents

TITLE = "Tiny ImageNet"
CLASSES = 200
COUNTS = {"train": 100_000, "test": 10_000}
_TRAIN = re.compile(r"(?:.*/)?train/(n\d{8})/images/[^/]+")
_VAL = re.compile(r"(?:.*/)?val/images/([^/]+)")


def read(source: Source, seed: int) -> Contents:
    """train/<wnid>/<file> and test/<wnid>/<file>. Raises UserError."""
    lists = [name for name in source.sizes if f"/{name}".endswith("/val/val_annotations.txt")]
    if len(lists) != 1:
        raise UserError(
            f"--source {source.path}: not {TITLE}: {len(lists)} files val/val_annotations.txt, and it has one"
        )
    lines = [line.split("\t") for line in source.text(lists[0]).splitlines() if line.strip()]  # file, class, a box
    if short_lines := [line for line in lines if len(line) < 2]:
        raise UserError(
            f"--source {source.path}: {lists[0]}: {short(short_lines[0][0])!r} is not an image, a tab and a class"
        )
    class_of = {file: label for file, label, *_ in lines}
    images: official.Images = {}
    for name in filter(official.is_image, source.sizes):
        if match := _TRAIN.fullmatch(name):
            official.add(images, source, "train", match[1], name)
        elif (match := _VAL.fullmatch(name)) and match[1] in class_of:
            official.add(images, source, "test", class_of[match[1]], name)
    names = official.checked(images, source, TITLE, list(COUNTS), CLASSES)
    official.tell_counts(images, TITLE, COUNTS)
    return official.copies(source, TITLE, names, images)
