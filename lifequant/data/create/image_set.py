"""Images of 32x32 pixels in memory, of CIFAR, scikit-learn's digits or a folder, and the domains that are made from them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from lifequant.common.errors import UserError
from lifequant.data.create.class_folders import class_images, class_names
from lifequant.data.create.prepared import SIZE, SPLITS, Contents, Place, numbered
from lifequant.data.split import lowest, ranks, share_of_each

BLUR = 2.0  # pixels: the standard deviation of the Gaussian
NOISE = 40.0  # of 255: the standard deviation of the noise


def blur(image: np.ndarray, _: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR)))


def grey(image: np.ndarray, _: int) -> np.ndarray:
    """The luminance (ITU-R 601) in all three channels."""
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def noise(image: np.ndarray, rank: int) -> np.ndarray:
    added = np.random.default_rng(rank).normal(0, NOISE, image.shape)
    return np.clip(np.round(image + added), 0, 255).astype(np.uint8)


# Name: how an image (32, 32, 3), uint8, of a rank that follows from its path and the seed, becomes one of the domain.
DOMAINS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "clean": lambda image, _: image,
    "grey": grey,
    "blur": blur,
    "noise": noise,
}


@dataclass(frozen=True)
class ImageSet:
    """Class names, and for train and test the uint8 images (N, 32, 32, 3) with their labels (N,)."""

    origin: str  # where they come from, in words that tell one source from another
    names: list[str]
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    def counts(self) -> dict[str, list[int]]:
        """Images of each class in train and test."""
        return {s: np.bincount(self.labels[s], minlength=len(self.names)).tolist() for s in SPLITS}

    def contents(self, domains: Sequence[str] | None, seed: int) -> Contents:
        """The images as PNGs that are numbered in each class, once or once for each domain."""
        counts, origin = self.counts(), self.origin
        if domains:
            counts = {f"{domain}/{split}": counts[split] for domain in domains for split in SPLITS}
            origin += f", {','.join(sorted(domains))}, seed {seed}"
        rows = {
            split: [np.flatnonzero(self.labels[split] == label) for label in range(len(self.names))] for split in SPLITS
        }

        def read(places: Sequence[Place]) -> Iterator[tuple[Place, bytes]]:
            label = {name: index for index, name in enumerate(self.names)}
            for place in places:
                part, name, file = place
                *domain, split = part.split("/")
                image = self.images[split][rows[split][label[name]][int(Path(file).stem) - 1]]
                if domain:
                    image = DOMAINS[domain[0]](image, ranks([f"{split}/{name}/{file}"], seed, domain[0])[0])
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                yield place, png.getvalue()

        return Contents(origin, self.names, numbered(self.names, counts), read)


def read_folder(folder: Path, classes: int) -> ImageSet:
    """train/<class>/* and test/<class>/* of ``folder``, images of 32x32 pixels. Raises UserError."""
    names = class_names(folder / "train")
    if len(names) != classes or class_names(folder / "test") != names:
        raise UserError(
            f"--source {folder}: {len(names)} classes in train/, {len(class_names(folder / 'test'))} in test/; "
            f"the data set has {classes}, the same in both"
        )
    images, labels = {}, {}
    for split in SPLITS:
        rows = class_images(folder, folder / split, names)
        images[split] = np.stack([_pixels(folder / path) for path, _ in rows])
        labels[split] = np.array([label for _, label in rows], dtype=np.int64)
    digest = hashlib.sha256(b"".join(images[split].tobytes() for split in SPLITS)).hexdigest()[:8]
    return ImageSet(f"a folder of images ({digest})", names, images, labels)


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.size == (SIZE, SIZE):
                return np.asarray(image.convert("RGB"))
            why = f"{image.width}x{image.height} pixels, and CIFAR's images have {SIZE}x{SIZE}"
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        why = f"no image that can be read ({error})"
    raise UserError(f"{path}: {why}: leave it out of --source") from None


def digits(seed: int) -> ImageSet:
    """scikit-learn's 1,797 digits, 8x8 gray enlarged to 32x32 RGB; 20 % of each class to test, chosen by the seed."""
    try:
        from sklearn.datasets import load_digits  # scikit-learn is optional
    except ImportError:
        raise UserError("the digits come with scikit-learn, which is missing: pip install lifequant[demo]") from None
    data = load_digits()
    gray = np.round(data.images * (255 / 16)).astype(np.uint8)  # levels 0 to 16
    images = np.stack(
        [
            np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB"))
            for image in gray
        ]
    )
    labels = data.target.astype(np.int64)
    names = [f"{index:04d}" for index in range(len(labels))]
    keep = share_of_each(dict(enumerate(np.bincount(labels).tolist())), 0.2)
    test = np.zeros(len(labels), dtype=bool)
    test[lowest(names, labels.tolist(), keep, seed, "digits_test")] = True
    return ImageSet(
        f"scikit-learn, seed {seed}",
        [str(digit) for digit in range(10)],
        {"train": images[~test], "test": images[test]},
        {"train": labels[~test], "test": labels[test]},
    )
