"""ImageCLEF-DA (2014): 12 classes with 50 images each in the domains b (Bing), c (Caltech-256), i (ImageNet) and p (Pascal VOC).

Its archive has the images, i/n02691156_7563.JPEG, and a list for each domain, list/iList.txt, with lines "i/n02691156_7563.JPEG 0".
Lists of b and c name the class folders of their origin, b/056.dog/E44C.jpg, and the archive has b/E44C.jpg. Both are read.
"""

from __future__ import annotations

import re
from collections import Counter

from lifequant.common.errors import UserError
from lifequant.common.safe_files import short
from lifequant.data.create import official
from lifequant.data.create.archives import Source
from lifequant.data.create.prepared import Contents

TITLE = "ImageCLEF-DA"
COUNTS = {"b": 600, "c": 600, "i": 600, "p": 600}
CLASSES = ["aeroplane", "bike", "bird", "boat", "bottle", "bus", "car", "dog", "horse", "monitor", "motorbike",
           "people"]  # in the order of the labels  # fmt: skip
_LIST = re.compile(r"(?:.*/)?([bcip])(?:_?list)?\.txt", re.IGNORECASE)
_IMAGE = re.compile(r"(?:.*/)?([bcip])/(?:[^/]+/)*?([^/]+)")


def read(source: Source, seed: int) -> Contents:
    """<domain>/train/<class>/<file> and <domain>/test/..., 80:20. Raises UserError.

    An image that is listed with two classes (nine of p are) is for training only, in both.
    """
    there: dict[tuple[str, str], list[str]] = {}
    for name in filter(official.is_image, source.sizes):
        if match := _IMAGE.fullmatch(name):
            there.setdefault(match.groups(), []).append(name)
    lists: dict[str, str] = {}
    for name in source.sizes:
        if match := _LIST.fullmatch(name):
            other = lists.setdefault(match[1].lower(), name)
            if other != name:
                raise UserError(f"--source {source.path}: two lists of one domain, {other} and {name}: remove one")
    images: official.Images = {}
    for domain, name in sorted(lists.items()):
        for number, line in enumerate(source.text(name).splitlines(), start=1):
            if line.strip():
                label, image = _entry(source, f"{name}, line {number}", domain, line, there)
                official.add(images, source, domain, label, image)
    domains = [
        domain for domain in COUNTS if domain in images or domain != "b"
    ]  # many copies have the other three alone
    names = official.checked(images, source, TITLE, domains, CLASSES)
    official.tell_counts(images, TITLE, COUNTS)
    listed = Counter(name for classes in images.values() for files in classes.values() for name in files.values())
    twice = frozenset(name for name, n in listed.items() if n > 1)
    return official.copies(source, f"{TITLE}, seed {seed}", names, official.split(images, seed, twice))


def _entry(
    source: Source, where: str, domain: str, line: str, there: dict[tuple[str, str], list[str]]
) -> tuple[str, str]:
    """(class, name in the source) of a line of a list."""
    listed, _, label = line.strip().rpartition(" ")
    if not (label.isdecimal() and int(label) < len(CLASSES)):
        raise UserError(
            f"--source {source.path}: {where}: {short(line)!r} is not a path and a label of 0 to {len(CLASSES) - 1}"
        )
    found = there.get((domain, listed.strip().rsplit("/", 1)[-1]), [])
    if len(found) > 1:  # class folders with files of one name
        found = [name for name in found if f"/{name}".endswith("/" + listed.strip().lstrip("/"))]
    if len(found) != 1:
        raise UserError(f"--source {source.path}: {where}: the image {short(listed)} is not in it")
    return CLASSES[int(label)], found[0]
