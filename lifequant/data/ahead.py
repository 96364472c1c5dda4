"""A thread that makes the next batches while the network has the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from lifequant.data.augment import CIFAR, PADDED_UP_TO, Statistics, load_batch, ready
from lifequant.data.photographs import EncodedImages

A = TypeVar("A")
B = TypeVar("B")

AHEAD = 2  # batches that are made before they are asked for


def ahead(make: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """``make(item)`` of each item in turn, by one thread, which is ``AHEAD`` before who asks. Close it if you leave early.

    The results do not depend on the thread: it makes one after the other. What ``make`` raises is raised here. ``items``
    are taken in the caller's thread.
    """
    waiting: deque[Future] = deque()
    thread = ThreadPoolExecutor(1, "ahead")
    try:
        _one_core(thread)
        for item in items:
            waiting.append(thread.submit(make, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _one_core(thread: ThreadPoolExecutor) -> None:
    """Let torch's operations in this thread take one core: the others have the step. What all other threads take stays."""
    others = torch.get_num_threads()
    thread.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(others)  # the former call counts for threads that begin later, too


def pays(images: Tensor | EncodedImages, device: torch.device) -> bool:
    """Whether making a batch of these images takes so long that a thread should do it: a GPU decodes nothing, but it augments
    and normalizes by itself, and a batch of small images is made in a millisecond."""
    return isinstance(images, EncodedImages) or (device.type == "cpu" and images.shape[-1] > PADDED_UP_TO)


def load_batches(
    images: Tensor | EncodedImages, parts: Iterable[Tensor], device: torch.device, statistics: Statistics = CIFAR
) -> Iterator[Tensor]:
    """The ``load_batch`` of each part's rows in turn, made ahead where it pays."""
    if not pays(images, device):
        return (load_batch(images, rows, device, statistics) for rows in parts)
    # Only the CPU's part is made ahead, so that a GPU has its work from one thread.
    if device.type == "cpu":
        return ahead(lambda rows: load_batch(images, rows, device, statistics), parts)
    return (ready(batch, device, statistics) for batch in ahead(images.__getitem__, parts))
