"""Office-31 (Saenko et al., ECCV 2010): 4,110 images of 31 classes in three domains.

Its archive has amazon/images/back_pack/frame_0001.jpg; copies of it without the folder images/ are read too.
"""

from __future__ import annotations

import re

from lifequant.data.create import official
from lifequant.data.create.archives import Source
from lifequant.data.create.prepared import Contents

TITLE = "Office-31"
COUNTS = {"amazon": 2817, "webcam": 795, "dslr": 498}
CLASSES = ["back_pack", "bike", "bike_helmet", "bookcase", "bottle", "calculator", "desk_chair", "desk_lamp",
           "desktop_computer", "file_cabinet", "headphones", "keyboard", "laptop_computer", "letter_tray", "mobile_phone",
           "monitor", "mouse", "mug", "paper_notebook", "pen", "phone", "printer", "projector", "punchers", "ring_binder",
           "ruler", "scissors", "speaker", "stapler", "tape_dispenser", "trash_can"]  # fmt: skip
_PATH = re.compile(rf"(?:.*/)?({'|'.join(COUNTS)})/(?:images/)?([^/]+)/[^/]+")


def read(source: Source, seed: int) -> Contents:
    """<domain>/train/<class>/frame_0001.jpg and <domain>/test/..., 80:20. Raises UserError."""
    images: official.Images = {}
    for name in filter(official.is_image, source.sizes):
        if match := _PATH.fullmatch(name):
            official.add(images, source, *match.groups(), name)
    names = official.checked(images, source, TITLE, list(COUNTS), CLASSES)
    official.tell_counts(images, TITLE, COUNTS)
    return official.copies(source, f"{TITLE}, seed {seed}", names, official.split(images, seed))
