"""What the codecs of --replay_codec cost and lose on a folder of images: bytes an image, and PSNR.

python scripts/measure_codecs.py data_dir/cifar10
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant.common.arguments import Parser, int_at_least, run_main
from lifequant.common.errors import UserError
from lifequant.data.codec import decode, encode

CASES = (("raw", None), ("bits4", None), *((codec, q) for codec in ("jpeg", "webp") for q in (10, 30, 50, 75)))


def measured(images: Sequence[np.ndarray], codec: str, quality: int | None) -> tuple[float, float]:
    """(mean bytes, PSNR in dB of the mean squared error) of uint8 images [3, H, W]."""
    if codec == "raw":
        return fmean(image.nbytes for image in images), float("inf")
    coded = [encode(image, codec, quality) for image in images]
    found = [decode(data, codec, quality, image.shape) for data, image in zip(coded, images, strict=True)]
    errors = [np.square(a.astype(float) - b).mean() for a, b in zip(found, images, strict=True)]
    return fmean(map(len, coded)), float(10 * np.log10(255**2 / fmean(errors)))


def main(argv: Sequence[str]) -> None:
    first, *_ = __doc__.split("\n", 1)
    parser = Parser(prog="measure_codecs.py", description=first)
    parser.add_argument("data_dir", help="folder with train/<class>/*")
    parser.add_argument("--images", type=int_at_least(1), default=1000, help="images, at equal distances")
    parser.add_argument("--image_size", type=int_at_least(8), default=32, help="side in pixels")
    args = parser.parse_args(argv)
    files = sorted(Path(args.data_dir).glob("train/*/*.png"))
    if not files:
        raise UserError(f"{args.data_dir}: no train/<class>/*.png: give a folder of PNG images")
    size = (args.image_size, args.image_size)
    chosen = files[:: max(1, len(files) // args.images)]
    images = [np.asarray(Image.open(file).convert("RGB").resize(size)).transpose(2, 0, 1) for file in chosen]
    print(f"{len(images)} images of {size[0]} pixels\n\n| codec | quality | bytes | PSNR, dB |\n|---|---:|---:|---:|")
    for codec, quality in CASES:
        size, psnr = measured(images, codec, quality)
        print(f"| {codec} | {quality or '-'} | {size:.0f} | {psnr:.1f} |")


if __name__ == "__main__":
    sys.exit(run_main(main))
