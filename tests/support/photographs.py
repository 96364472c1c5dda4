"""Six classes of photographs of their own sizes and kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lifequant.data.decode import decode_whole
from lifequant.data.photographs import Photographs
from support.tiny import CLASSES, Tiny, write_csvs

SIDE = 24
KINDS = ("plain", "gray", "cmyk", "alpha", "turned", "progressive", "palette", "small")
REFERENCE = {"augment": "reference", "image_size": SIDE}


def write_photograph(folder: Path, kind: str, number: int, noise: np.random.Generator) -> None:
    """A picture of its own size, with coarse colors and fine grain."""
    width, height = (20, 16) if kind == "small" else (50 + 7 * number, 90 - 9 * number)
    coarse = Image.fromarray(noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    picture = Image.fromarray((np.asarray(coarse) // 2 + noise.integers(0, 128, (height, width, 1))).astype(np.uint8))
    name = folder / f"{number:04d}_{kind}"
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "turned" else 1
    match kind:
        case "alpha":
            picture.putalpha(Image.new("L", picture.size, 90))
            picture.save(f"{name}.png")
        case "palette":
            picture.convert("P").save(f"{name}.gif")
        case _:
            mode = {"gray": "L", "cmyk": "CMYK"}.get(kind, "RGB")
            picture.convert(mode).save(f"{name}.jpg", quality=90, progressive=kind == "progressive", exif=exif)


def write_photographs(top: Path) -> Tiny:
    """Six classes of eight photographs, one of each kind, four of them for the test, and two tasks."""
    noise = np.random.default_rng(0)
    for side, kinds in (("train", KINDS), ("test", KINDS[:4])):
        for name in CLASSES:
            (top / "images" / side / name).mkdir(parents=True)
            for number, kind in enumerate(kinds):
                write_photograph(top / "images" / side / name, kind, number, noise)
    csvs = write_csvs(top / "images", top / "csv")
    return Tiny(top / "images", csvs, csvs)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def files(photos: Tiny) -> list[str]:
    return [path.relative_to(photos.images).as_posix() for path in sorted((photos.images / "train/ant").iterdir())]


def opened(photos: Tiny, **more: object) -> Photographs:
    found = [decode_whole(photos.images / name)[0] for name in files(photos)]
    sizes = torch.tensor([pixels.shape[:2] for pixels in found])
    given = {"held": True, "least": 0.08, **more}
    return Photographs(photos.images, files(photos), SIDE, given["held"], sizes, given["least"], given.get("pixels"))
