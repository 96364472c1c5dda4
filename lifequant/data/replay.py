"""Which images are stored for replay, how a batch draws them, and BaLL's sampler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lifequant.data.split import ranks, share_of_each, total_of_each
from lifequant.data.task import Epoch, Task
from lifequant.losses import rebalancing_weights


def stored_rows(
    paths: Sequence[str],
    labels: Sequence[int],
    tasks: Sequence[Sequence[int]],
    rate: float,
    buffer: int | None,
    seed: int,
) -> Iterator[list[int]]:
    """After each task, the rows that are kept at random: the same share of every class of each, or ``buffer`` images in all.

    ``tasks`` has the rows of each task. The buffer is filled task after task, by rank. An image that was dropped is gone, so
    the buffer's part of an old task only shrinks.
    """
    rank = ranks(paths, seed, "replay")
    order = partial(sorted, key=lambda row: (rank[row], row))
    stored: list[int] = []
    seen: set[int] = set()
    for rows in tasks:
        seen.update(rows)
        stored = next_stored(stored, rows, labels, Counter(labels[r] for r in seen), rate, buffer, order)
        yield sorted(stored)


def next_stored(
    stored: Sequence[int],
    new: Sequence[int],
    labels: Sequence[int],
    seen: dict[int, int],
    rate: float,
    buffer: int | None,
    order: Callable[[list[int]], list[int]],
) -> list[int]:
    """The rows that are kept once the task with the rows ``new`` has ended, of those and of the ``stored`` ones.

    Either ``buffer`` images in all, or all that were stored and the share ``rate`` of each new class. ``labels`` is by row,
    ``seen`` counts the images of each class until now. ``order`` gives rows of one class in the order in which they are kept.
    """
    pool = sorted({*stored, *new} if buffer is not None else new)
    there = Counter(labels[r] for r in pool)
    keep = _quota(seen, there, buffer) if buffer is not None else share_of_each(there, rate)
    by_class: dict[int, list[int]] = {label: [] for label in sorted(there)}
    for row in pool:
        by_class[labels[row]].append(row)
    kept = [row for label, rows in by_class.items() for row in order(rows)[: keep.get(label, 0)]]
    return kept if buffer is not None else list(dict.fromkeys([*stored, *kept]))


def _quota(seen: dict[int, int], there: dict[int, int], total: int) -> dict[int, int]:
    """``total`` images in all, the same share of every class of those seen, as far as they are still there."""
    keep = {label: min(n, there[label]) for label, n in total_of_each(seen, total).items()}
    for _ in range(min(total, sum(there.values())) - sum(keep.values())):  # rounding may leave a class one image short
        label = min((label for label in keep if keep[label] < there[label]), key=lambda c: (keep[c] / seen[c], c))
        keep[label] += 1
    return keep


def epoch_order(labels: Tensor, counts: Tensor, sampler: str, generator: torch.Generator) -> Tensor:
    """int64 [N], indices into the pool in the order of one epoch.

    uniform: a permutation. ball: N draws with replacement, with probability proportional to r of the image's class, so
    that rare classes come more often.
    """
    if sampler == "uniform":
        return torch.randperm(len(labels), generator=generator)
    weights = rebalancing_weights(counts.double().cpu())[labels.cpu()]
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


def epoch_of(task: Task, parts: tuple[int, int], sampler: str, generator: torch.Generator) -> Epoch:
    """The batches of one epoch, each of ``parts`` = (new images, stored images beside them), as task.batch_parts gives them.

    With stored images beside them, the epoch is one pass over the new images. The stored ones are drawn in passes over
    the store, so that a batch has none twice (as Avalanche's ReplayDataLoader draws them; Mammoth draws each batch anew).
    ``ball`` draws both kinds with replacement, by the weights of ``epoch_order``. New and stored images alternate, so that
    each process has its share of both. With none beside them, the whole pool is shuffled as one.
    """
    new, beside = parts
    labels = task.labels[task.pool]
    if not beside:
        return task.epoch(epoch_order(labels, task.counts, sampler, generator), new)
    first = len(task.new_rows)
    order = epoch_order(labels[:first], task.counts, sampler, generator)
    batches = -(-first // new)
    order = order[torch.arange(batches * new) % first].view(batches, new)
    stored = torch.empty(0, beside, dtype=torch.int64)
    while len(stored) < batches:
        drawn = epoch_order(labels[first:], task.counts, sampler, generator)
        stored = torch.cat([stored, drawn[: len(drawn) // beside * beside].view(-1, beside)])
    places = torch.cat([(torch.arange(n) + 0.5) / n for n in parts]).argsort(stable=True)
    order = torch.cat([order, first + stored[:batches]], 1)[:, places]
    return task.epoch(order.flatten(), new + beside)
