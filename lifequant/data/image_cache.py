"""Images are decoded once to a uint8 tensor that is cached on disk. The cache is safe to delete and is rebuilt if stale.

Each image is written as soon as it is decoded, so that a build needs memory for a few images only. The file has a
temporary name until it is whole. It is a .npy file, which numpy reads too.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lifequant.common import fault_injection
from lifequant.common.errors import UserError
from lifequant.common.files import lock
from lifequant.common.safe_files import open_regular, stats_inside
from lifequant.data.cache_folder import megabytes
from lifequant.data.decode import decode, quiet
from lifequant.data.image_storage import map_images

_FORMAT = 2  # of the cache file; a part of the key
_AHEAD = 64  # images, besides one per core, that are decoded before they are written

Stats = Sequence["os.stat_result | None"]


def load_images(
    root: Path,
    paths: Sequence[str],
    size: int,
    cache_dir: Path,
    name: str,
    say: Callable[[str], None],
    mapped: bool = False,
    stats: Stats | None = None,
) -> Tensor:
    """uint8 [len(paths), 3, size, size], from the cache or decoded now. If ``mapped``, they stay in the file (map_images).

    ``stats`` is ``stats_inside(root, paths)`` if the caller has it. Raises UserError for an image that can't be decoded,
    and for a cache that can't be written if images must be mapped.
    """
    cached = cache_dir / f"{name}-{key(root, paths, size, stats or stats_inside(root, paths))}.npy"
    shape = (len(paths), 3, size, size)

    def pixels(path: str) -> tuple[np.ndarray, str | None]:
        image, done = decode(root / path, size)
        return np.ascontiguousarray(image.numpy()), done

    images = _open(cached, shape, mapped)
    if images is not None:
        return images
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)

        def waiting(owner: str) -> None:
            say(f"waiting for {owner} to finish decoding")

        with lock(cached.with_name(f"{cached.name}.lock"), waiting):
            images = _open(cached, shape, mapped)  # another process may have written it meanwhile
            if images is None:
                with closing(in_order(paths, pixels, say)) as decoded:
                    _build(cached, decoded, shape)
                size = megabytes(cached.stat().st_size)
                say(f"{name}: {len(paths)} decoded images, {size}, are kept in {cache_dir} (see lifequant cache)")
                images = _open(cached, shape, mapped)
        if images is None:
            raise OSError(errno.EIO, "the new cache file can't be read")
        return images
    except OSError as error:
        problem = f"the image cache {cache_dir} can't be written ({error.strerror})"
    if mapped:
        raise UserError(f"--cache mmap: {problem}: {math.prod(shape) / 1e9:.1f} GB are needed; name a --cache_dir")
    say(f"{problem}: images are kept in memory for this run")
    whole = np.empty(shape, np.uint8)
    for index, image in enumerate(in_order(paths, pixels, say)):
        whole[index] = image
    return torch.from_numpy(whole)


def key(root: Path, paths: Sequence[str], size: int, stats: Stats) -> str:
    """A hash of everything that the decoded tensor depends on: names, sizes and times of the files."""
    digest = hashlib.sha256(f"{_FORMAT} {size} {root}\n".encode())
    for path, status in zip(paths, stats, strict=True):
        if status is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(root / path))
        digest.update(f"{path}\t{status.st_size}\t{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _header(shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file of uint8."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _open(cached: Path, shape: tuple[int, ...], mapped: bool) -> Tensor | None:
    """The images in a cache file, or None if it is missing or broken."""
    header, count = _header(shape), math.prod(shape)
    try:
        with open_regular(cached, len(header) + count) as file:
            if file.read(len(header)) != header or os.fstat(file.fileno()).st_size != len(header) + count:
                return None
            with suppress(OSError):  # a read-only folder, or another user's file
                os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))  # the last use
            if mapped and count:
                return map_images(file, len(header), shape)
            return torch.from_numpy(np.fromfile(file, np.uint8, count).reshape(shape))
    except (OSError, ValueError, UserError):  # UserError: larger, or no file at all
        return None
    except MemoryError:
        raise UserError(
            f"{count / 1e9:.1f} GB of decoded images don't fit memory: leave them on disk (--cache mmap)"
        ) from None


def _build(cached: Path, images: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    """Write ``images`` to the file ``cached``, whole or not at all. The caller holds its lock. Raises OSError."""
    header = _header(shape)
    temporary = cached.with_name(f"{cached.name}.part")
    temporary.unlink(missing_ok=True)  # left by a build that was killed
    try:
        with temporary.open("xb") as file:
            if shutil.disk_usage(cached.parent).free < len(header) + math.prod(shape):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.write(header)
            for image in images:
                file.write(image)
                fault_injection.point("cache")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, cached)
    finally:
        temporary.unlink(missing_ok=True)


def in_order(
    paths: Sequence[str], make: Callable[[str], tuple[np.ndarray, str | None]], say: Callable[[str], None]
) -> Iterator[np.ndarray]:
    """``make(path)[0]`` of each path in turn, by one thread per core (decoders release the GIL). ``say`` is told what was
    converted, by what ``make`` gives beside."""
    conversions: dict[str, int] = {}
    waiting: deque[Future] = deque()
    workers = os.cpu_count() or 1
    ahead = _AHEAD + workers
    with (
        quiet(),
        ThreadPoolExecutor(workers) as pool,
        tqdm(None, "decoding", len(paths), unit=" images", leave=False, disable=None) as bar,
    ):
        for index in range(len(paths) + ahead):
            if index < len(paths):
                waiting.append(pool.submit(make, paths[index]))
            if index >= ahead:  # the one that has waited longest
                image, done = waiting.popleft().result()
                if done:
                    conversions[done] = conversions.get(done, 0) + 1
                yield image
                bar.update()
    for done, count in conversions.items():
        say(f"{count} of {len(paths)} images were converted: {done}")
