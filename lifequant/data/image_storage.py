"""Where images are stored (memory, the mapped cache file, the GPU, or encoded), and copying rows of them to a device.

Decoded images are one uint8 tensor in the first three places, encoded ones stand in for it (photographs.EncodedImages).
``take`` copies rows of it, so a run's results do not depend on the place.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

SHARE = 0.5  # of the memory that is available: images that take more than this are not held in it
_CGROUP = Path("/sys/fs/cgroup")


class ImageLocation(NamedTuple):
    """Where a run's images are stored."""

    mapped: bool  # read from the cache file batch by batch, instead of held in memory
    resident: bool  # on the run's device; False: rows are copied there batch by batch
    encoded: bool = False  # decoded whenever they are needed, from their files' bytes
    held: bool = False  # these bytes are in memory; False: each file is read whenever it is needed


def choose_location(
    cache: str,
    nbytes: int,
    device: torch.device,
    say: Callable[[str], None],
    encoded: int | None = None,
    whole: bool = False,
) -> ImageLocation:
    """``--cache`` for ``nbytes`` of decoded images: memory, encoded, mmap, or auto, which follows ``SHARE``. ``say`` is told
    of an unusual choice. ``encoded``: bytes of the files, where auto may choose these; ``whole``: photographs of any size,
    which no cache file has and no GPU holds."""
    resident = not whole and cache not in ("mmap", "encoded")
    if device.type == "cuda" and resident:
        free = torch.cuda.mem_get_info(device)[0]
        resident = nbytes <= SHARE * free
        if not resident:
            say(
                f"the images take {nbytes / 1e9:.1f} GB decoded, more than half of the GPU's {free / 1e9:.1f} GB free: "
                "each batch is copied there"
            )
    available = available_bytes()

    def fits(size: int) -> bool:
        return available is None or size <= SHARE * available

    place = cache
    if cache == "auto":
        place = "memory" if fits(nbytes) else "mmap"
        if (
            place == "mmap"
            and encoded is not None
            and (whole or fits(encoded))
            and not (resident and device.type == "cuda")
        ):
            place = "encoded"
        if place != "memory":
            say(
                f"--cache auto: {place} (the images take {nbytes / 1e9:.1f} GB decoded, more than half of the "
                f"{available / 1e9:.1f} GB of memory available)"
            )
    held = place == "encoded" and fits(encoded or 0)
    if place == "encoded" and not held:
        say(
            f"--cache encoded: the files, {encoded / 1e9:.1f} GB, are read batch by batch, since they take more than half of the "
            "memory available"
        )
    return ImageLocation(place == "mmap", resident and place != "encoded", place == "encoded", held)


def available_bytes() -> int | None:
    """Bytes of memory that are free, within a container's limit (cgroup v2 or v1). Off Linux: all memory. None if unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    except OSError:
        pass
    for folder, limit, usage, cached in (
        (_CGROUP, "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            found.append(most - used + int(stat[cached]))
        except (OSError, ValueError, KeyError):  # no such group, or no limit ("max")
            pass
    if not found:
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, OSError, ValueError):
            return None
    return max(0, min(found))


def map_images(file: BinaryIO, offset: int, shape: tuple[int, ...]) -> Tensor:
    """uint8 ``shape``, the bytes of ``file`` from ``offset`` on, read on first access. It must not be written to.

    The mapping is shared and read-only: a private, writable one counts as memory, and one larger than memory is refused.
    """
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors, and says so
        images = torch.frombuffer(mapping, dtype=torch.uint8, offset=offset).view(shape)
    images.mapping = mapping, offset
    return images


def take(images: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """``images[rows]`` on ``device``, a copy. ``rows`` int64 [N], best on the images' device: else they are waited for."""
    mapping = getattr(images, "mapping", None)
    rows = rows.to(images.device)
    if mapping is not None:
        _read_ahead(*mapping, rows.tolist(), images[0].nbytes)
    found = images[rows]
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        # Else the process seems to hold what it has read. The pages stay in the system's cache as long as there is room.
        mapping[0].madvise(mmap.MADV_DONTNEED)
    return send(found, device)


def send(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``. From the CPU to a GPU by pinned memory, which torch keeps until the copy is done: the copy
    runs in the GPU's queue, and nothing waits."""
    if values.device == device:
        return values
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def _read_ahead(mapping: mmap.mmap, offset: int, rows: list[int], nbytes: int) -> None:
    """Ask for all rows at once, which is faster than to wait for each page."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    for row in rows:
        start = offset + row * nbytes
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, first, start + nbytes - first)
