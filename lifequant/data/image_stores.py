"""The images of a run, where ``--cache`` and ``--augment`` put them: decoded in memory, in a file or on the GPU, or encoded."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from os import stat_result
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lifequant.common.files import write_all
from lifequant.config import Config
from lifequant.data.augment import PADDED_UP_TO
from lifequant.data.cache_folder import cache_dir_of
from lifequant.data.decode import decode_whole
from lifequant.data.image_cache import Stats, in_order, key, load_images
from lifequant.data.image_storage import ImageLocation, choose_location
from lifequant.data.photographs import EncodedImages, Photographs


def open_images(
    config: Config,
    root: Path,
    prefix: str,
    paths_of: Mapping[str, Sequence[str]],
    stats: Mapping[str, stat_result],
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Tensor | EncodedImages]:
    """For each name of ``paths_of``, like "train", the images of these paths. ``stats`` has every path's. Raises UserError."""
    size, cache = config.image_size, cache_dir_of(config.cache_dir)
    every = [path for paths in paths_of.values() for path in paths]
    whole, nbytes = config.augment == "reference", 3 * size**2 * len(every)
    encoded = sum(stats[path].st_size for path in every)

    def sizes(kind: str) -> Tensor:
        return check_images(root, paths_of[kind], [stats[p] for p in paths_of[kind]], cache, f"{prefix}-{kind}", say)

    sizes_of = {kind: sizes(kind) for kind in paths_of} if whole else {}
    if whole:
        nbytes = 3 * sum(int(found.prod(1).sum()) for found in sizes_of.values())
    offered = encoded if whole or size > PADDED_UP_TO or config.cache == "encoded" else None
    where = choose_location(config.cache, nbytes, device, say, offered, whole)

    def images(kind: str) -> Tensor | EncodedImages:
        paths = paths_of[kind]
        if whole:
            return _photographs(config, root, paths, sizes_of[kind], where, say)
        if where.encoded:
            sizes(kind)
            return EncodedImages(root, paths, size, where.held)
        of_files = [stats[path] for path in paths]
        found = load_images(root, paths, size, cache, f"{prefix}-{kind}", say, where.mapped, of_files)
        return found.to(device) if where.resident else found

    return {kind: images(kind) for kind in paths_of}


def _photographs(
    config: Config,
    root: Path,
    paths: Sequence[str],
    sizes: Tensor,
    where: ImageLocation,
    say: Callable[[str], None],
) -> Photographs:
    pixels = None
    if not where.encoded:
        pixels = list(in_order(paths, lambda path: (decode_whole(root / path)[0], None), say))
    return Photographs(root, paths, config.image_size, where.held, sizes, config.crop_scale, pixels)


def check_images(
    root: Path, paths: Sequence[str], stats: Stats, cache_dir: Path, name: str, say: Callable[[str], None]
) -> Tensor:
    """int64 [N, 2]: height and width of each image, upright. Each is decoded once to see that it is whole; the cache keeps
    the sizes, so that later runs needn't. Raises UserError for an image that can't be decoded."""
    kept = cache_dir / f"{name}-{key(root, paths, 0, stats)}.npy"
    try:
        sizes = np.load(kept, allow_pickle=False)
        if sizes.shape == (len(paths), 2) and sizes.dtype == np.int32 and (sizes > 0).all():
            return torch.from_numpy(sizes).long()
    except (OSError, ValueError, EOFError):
        pass

    def size(path: str) -> tuple[np.ndarray, str | None]:
        pixels, done = decode_whole(root / path)
        return np.array(pixels.shape[:2], np.int32), done

    sizes = np.stack(list(in_order(paths, size, say)))
    content = io.BytesIO()
    np.save(content, sizes)
    with suppress(OSError):  # a folder that can't be written: the next run checks again
        write_all({kept: content.getvalue()})
    return torch.from_numpy(sizes).long()
