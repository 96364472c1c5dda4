"""What is stored for replay where it depends on the run: ``--replay_selection`` and ``--memory_budget``.

A random choice alone follows from the seed (DataSet.stored). What is chosen here is kept in the checkpoint.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F

from lifequant.config import REPLAY_RATE
from lifequant.data.codec import label_bytes
from lifequant.data.replay import next_stored
from lifequant.data.split import ranks
from lifequant.data.task import Task
from lifequant.evaluation.exemplars import by_loss, herding
from lifequant.evaluation.nearest_mean import features
from lifequant.qat.modes import eval_mode
from lifequant.runtime import distributed
from lifequant.training.memory import left_for_images
from lifequant.training.run import Run


def choose(run: Run, task: Task) -> None:
    """Add to ``run.data.chosen`` the rows that are stored once ``task`` has ended, with the model as it is now.

    Images that were chosen before keep their order in their class, unless the task had new ones of it.
    """
    config, data, t = run.config, run.data, task.task_index
    if not data.chooses(config) or run.method.joint:
        return
    labels, former, new = data.train.labels.tolist(), data.chosen[t - 1] if t else [], data.new_rows[t]
    seen = Counter(labels[row] for row in set().union(*data.new_rows[: t + 1]))
    budget = config.memory_budget
    rate = (REPLAY_RATE if budget is None else 1.0) if config.replay_rate is None else config.replay_rate
    sheds = budget is not None or config.buffer_size is not None  # else nothing that is stored is ever dropped
    pool = sorted({*former, *new}) if sheds else new
    cost = _cost(run, task, pool) if budget is not None else {}
    most = config.buffer_size or max(len(seen), round(rate * sum(seen.values())))
    if budget is not None:
        left = left_for_images(run, task)
        most = min(most, left // min(cost.values()))
    orders = {label: [row for row in former if labels[row] == label] for label in seen}
    again = set() if sheds else {*former} & {*new}  # stored, and new once more: they stay
    for label in sorted({labels[row] for row in new}):
        first = [row for row in orders[label] if row in again]
        rest = [row for row in pool if labels[row] == label and row not in again]
        orders[label] = first + _order(run, task, rest, most)

    def kept(buffer: int | None) -> list[int]:
        return next_stored(former, new, labels, seen, rate, buffer, lambda rows: orders[labels[rows[0]]])

    if budget is None:
        rows = kept(config.buffer_size)
    else:
        low, high = 0, min(most, len(pool))
        while low < high:  # the largest buffer that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if sum(cost[row] for row in kept(middle)) <= left else (low, middle - 1)
        rows = kept(low)
        if not rows:
            run.log.warn(f"{task.name}: --memory_budget leaves no room for a stored image")
    data.chosen[t:] = [distributed.of_first(rows)]
    run.task_sizes = data.task_sizes(config)


def _cost(run: Run, task: Task, pool: list[int]) -> dict[int, int]:
    """{row: bytes that it takes when it is stored}: of its pixels, its label if it is encoded, and what goes with it."""
    config, data = run.config, run.data
    more = sum(callback.bytes_per_image(task.num_classes) for callback in run.callbacks)
    coded = task.coded if config.replay_code_new else data.coded(pool, config)
    if coded is None:
        return dict.fromkeys(pool, data.train.images[0].nbytes + more)
    sizes = coded.sizes_of(torch.tensor(pool, device=task.labels.device))
    return {row: size + label_bytes(data.num_classes) + more for row, size in zip(pool, sizes, strict=True)}


def _order(run: Run, task: Task, rows: list[int], most: int) -> list[int]:
    """``rows`` of one class in the order in which they are kept, at least the first ``most``."""
    config, paths = run.config, [run.data.train.paths[row] for row in rows]
    rank = ranks(paths, config.seed, "replay")
    if config.replay_selection == "random":
        return [row for _, row in sorted(zip(rank, rows, strict=True))]
    batches = task.batches(torch.tensor(rows, device=task.labels.device), config.eval_batch_size)
    if config.replay_selection == "herding":
        order = herding(features(run.model, (x for x, _ in batches)), most)
    else:
        with torch.no_grad(), eval_mode(run.model):
            losses = torch.cat([F.cross_entropy(run.model(x).float(), y, reduction="none") for x, y in batches])
        order = by_loss(losses, [(value + 0.5) / 2**64 for value in rank])
    return [rows[index] for index in order]
