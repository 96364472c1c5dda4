"""Which classes a task has and which images are kept: pure functions of names, labels and a seed.

Every choice among images follows a hash of (seed, purpose, path), never a generator's state. So an image is kept or
dropped whatever the other images, tasks or commands are, a buffer that shrinks is a subset of what it was, and the
generator of the task CSVs agrees with the training run.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

TEST_SHARE = 0.2  # of a domain that comes without a split of its own


def class_tasks(num_classes: int, num_tasks: int, gamma: float, seed: int) -> list[list[int]]:
    """The labels of each task, when a share ``gamma`` (0 < gamma <= 1) of the classes is replaced from task to task.

    n = floor(K / (1 + gamma (T - 1))) classes a task; task t starts at position t * floor(n * gamma) of a seeded class
    order; the last task takes all that remain (Liu et al., ICCV 2023, as in the authors' code). gamma = 1 is disjoint.
    """
    order = np.random.default_rng(seed).permutation(num_classes).tolist()
    size = math.floor(num_classes / (1 + gamma * (num_tasks - 1)) + 1e-9)
    stride = math.floor(size * gamma + 1e-9)
    starts = [task * stride for task in range(num_tasks)]
    stops = [start + size for start in starts[:-1]] + [num_classes]
    return [sorted(order[start:stop]) for start, stop in zip(starts, stops, strict=True)]


def ranks(paths: Sequence[str], seed: int, purpose: str) -> list[int]:
    """A pseudo-random 64-bit rank for each path; the lowest are kept first."""
    key = f"{seed}/{purpose}/".encode()
    return [int.from_bytes(hashlib.blake2b(key + path.encode(), digest_size=8).digest(), "big") for path in paths]


def lowest(paths: Sequence[str], labels: Sequence[int], keep: dict[int, int], seed: int, purpose: str) -> list[int]:
    """Indices (ascending) of the ``keep[label]`` lowest-ranked images of each class; a label not in ``keep`` keeps none."""
    by_class: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for index, (rank, label) in enumerate(zip(ranks(paths, seed, purpose), labels, strict=True)):
        by_class[int(label)].append((rank, index))
    return sorted(index for label, rows in by_class.items() for _, index in sorted(rows)[: keep.get(label, 0)])


def share_of_each(counts: dict[int, int], rate: float) -> dict[int, int]:
    """The same share ``rate`` of every class, rounded, at least one image a class (none at rate 0)."""
    return {label: max(1, round(rate * n)) if rate > 0 else 0 for label, n in counts.items()}


def total_of_each(counts: dict[int, int], total: int) -> dict[int, int]:
    """``total`` images in all, the same share of every class; largest remainders get what rounding leaves over."""
    available = sum(counts.values())
    if total >= available:
        return dict(counts)
    exact = {label: total * n / available for label, n in counts.items()}
    keep = {label: math.floor(x) for label, x in exact.items()}
    by_remainder = sorted(exact, key=lambda label: (keep[label] - exact[label], label))
    for label in by_remainder[: total - sum(keep.values())]:
        keep[label] += 1
    return keep


def long_tail(counts: dict[int, int], num_classes: int, lt_gamma: float) -> dict[int, int]:
    """Images kept of class c: n_max * lt_gamma^(-c / (K - 1)), at least 1 (Cui et al. 2019; lt_gamma 1 is balanced)."""
    largest = max(counts.values())
    last = max(num_classes - 1, 1)
    return {c: max(1, min(n, math.floor(largest * lt_gamma ** (-c / last) + 1e-9))) for c, n in counts.items()}
