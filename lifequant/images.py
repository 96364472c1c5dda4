"""Images decoded once: a uint8 tensor, cached on disk, keyed by what went in. Safe to delete; rebuilt if stale."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lifequant.errors import UserError

_FORMAT = 1  # of the cached file; another one is another key


def default_cache_dir() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lifequant"


def load_images(
    root: Path, paths: Sequence[str], size: int, cache_dir: Path, name: str, say: Callable[[str], None]
) -> Tensor:
    """uint8 [len(paths), 3, size, size], from the cache or decoded now. Raises UserError for what can't be decoded."""
    cached = cache_dir / f"{name}-{_key(root, paths, size)}.npy"
    try:
        with cached.open("rb") as file:
            images = np.lib.format.read_array(file, allow_pickle=False)
        if images.shape == (len(paths), 3, size, size) and images.dtype == np.uint8:
            return torch.from_numpy(images)
    except (OSError, ValueError, EOFError, MemoryError):
        pass  # not there yet, or broken: it is made anew
    images = _decode_all(root, paths, size, say)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_name(f"{cached.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.save(file, images, allow_pickle=False)
            os.replace(temporary, cached)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        say(f"the image cache {cache_dir} can't be written ({error.strerror}): images are kept in memory for this run")
    return torch.from_numpy(images)


def missing_images(root: Path, paths: Sequence[str]) -> list[str]:
    """Those of ``paths`` that aren't there."""
    return [path for path in paths if not (root / path).is_file()]


def _key(root: Path, paths: Sequence[str], size: int) -> str:
    """A hash of everything that the decoded tensor depends on: names, sizes and times of the files."""
    digest = hashlib.sha256(f"{_FORMAT} {size} {root}\n".encode())
    for path in paths:
        stat = os.stat(root / path)
        digest.update(f"{path}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def as_pixels(image: Image.Image, size: int) -> tuple[Tensor, str | None]:
    """(uint8 [3, size, size], what had to be done to make it so or None)."""
    done = [] if image.mode == "RGB" else [f"{image.mode} to RGB"]
    image = image.convert("RGB")
    width, height = image.size
    if (width, height) != (size, size):
        done.append(f"scaled to {size}x{size}" if width == height else f"scaled, and the middle cut to {size}x{size}")
        short = min(width, height)
        left, top = (width - short) // 2, (height - short) // 2
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
    return torch.from_numpy(np.array(image).transpose(2, 0, 1)), " and ".join(done) or None


def decode(path: Path, size: int) -> tuple[Tensor, str | None]:
    """``as_pixels`` of a file. Raises UserError for a broken image."""
    try:
        with Image.open(path) as image:
            return as_pixels(image, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: this image can't be read ({error}): replace it, or take its row out of the CSV"
        ) from None


def _decode_all(root: Path, paths: Sequence[str], size: int, say: Callable[[str], None]) -> np.ndarray:
    images = np.empty((len(paths), 3, size, size), np.uint8)
    conversions: dict[str, int] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda path: decode(root / path, size), paths)
        for place, (image, done) in enumerate(
            tqdm(results, "decoding", len(paths), unit=" images", leave=False, disable=None)
        ):
            images[place] = image
            if done:
                conversions[done] = conversions.get(done, 0) + 1
    for done, count in conversions.items():
        say(f"{count} of {len(paths)} images were converted: {done}")
    return images
