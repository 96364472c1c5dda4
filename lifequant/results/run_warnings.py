"""What a run warns of when a task ends. Each thing is said once in a run, also after a resumption."""

from __future__ import annotations

import math

import torch

from lifequant.qat.layers import fake_quants
from lifequant.quantizers.base import STEP_FLOOR
from lifequant.training.run import Run

MOSTLY_LIMITED = 0.05  # a scale of which more updates were limited is warned of
AT_CHANCE = 0.01  # an accuracy that chance gives more often than this is no proof of learning


def warn_of(run: Run, task_index: int) -> None:
    """Warn of a penalty that holds the new task down, of accuracy at chance, and of scales that are not learned well.

    The penalty holds the task down where accuracy among the task's own classes is below 0.8 of the first task's. Overall
    accuracy would not do, since it falls as the classes of former tasks compete.
    """
    now, masked = run.history["training"][-1], run.history["top1_masked"]
    remedy = f"a smaller --ll_lambda than {run.config.ll_lambda:g} may do better"
    if now["penalty"] > now["task_loss"]:
        once(
            run,
            f"task {run.data.ids[task_index]}: ",
            "the penalty is larger than the task loss",
            f" ({now['penalty']:.3g}, {now['task_loss']:.3g}): {remedy}",
        )
    elif run.penalty.has_penalty and task_index > 0 and masked[task_index][task_index] < 0.8 * masked[0][0]:
        once(
            run,
            f"task {run.data.ids[task_index]} is learned to {masked[task_index][task_index]:.1f} % (task-masked, Task-IL) where the first was to {masked[0][0]:.1f} %: ",
            "the penalty holds it down, or it is harder",
            f"; {remedy}",
        )
    _warn_of_chance(run, task_index)
    for name, updates in run.scales.most_limited().items():
        if updates > MOSTLY_LIMITED * run.step:
            once(
                run,
                f"task {run.data.ids[task_index]}: ",
                f"the step size of {name} would have changed by more than a tenth",
                f" at {updates} of {run.step} updates, and was held to that: a smaller --lr or --step_lr may do better",
            )
    for name, quant in fake_quants(run.model):
        if quant.scale().min().item() <= STEP_FLOOR:
            once(
                run,
                f"task {run.data.ids[task_index]}: ",
                f"the step size of {name} is at its floor",
                ": this layer has stopped quantizing sensibly; a smaller --lr or --step_lr may do better",
            )


def warn_of_one_code(run: Run, layer: str) -> None:
    """Warn of a layer whose weights have all become one value, so that all its outputs are alike."""
    once(
        run,
        f"task {run.data.ids[run.task_index]}: ",
        f"all weights of {layer} have one code",
        ": it can tell nothing apart; a smaller --lr or --step_lr, or more bits for it (--layer_bits) may do better",
    )


def _warn_of_chance(run: Run, task_index: int) -> None:
    """Warn where the newest task is learned no better than by naming its most frequent class for every test image.

    "No better" means that chance gives as many hits in more than AT_CHANCE of cases (binomial, one-sided). Only the task's own
    classes compete.
    """
    labels = run.data.test.labels[torch.tensor(run.data.test_rows[task_index])].cpu()
    accuracy, images = run.history["top1_masked"][-1][task_index], len(labels)
    chance = labels.bincount().max().item() / images
    if chance < 1 and chance_of(round(accuracy * images / 100), images, chance) > AT_CHANCE:
        once(
            run,
            f"task {run.data.ids[task_index]}: ",
            "its accuracy is at chance",
            f": {accuracy:.1f} % among its own classes, where {100 * chance:.1f} % are of one class ({images} test images): "
            "more --num_epochs or another --lr may do better",
        )


def chance_of(hits: int, images: int, rate: float) -> float:
    """The probability of at least ``hits`` among ``images``, each a hit at ``rate`` in (0, 1): the binomial's upper tail."""
    whole = math.lgamma(images + 1)
    logs = (
        whole - math.lgamma(k + 1) - math.lgamma(images - k + 1) + k * math.log(rate) + (images - k) * math.log1p(-rate)
        for k in range(hits, images + 1)
    )
    return math.fsum(math.exp(value) for value in logs)


def once(run: Run, begin: str, what: str, rest: str) -> None:
    """Warn with ``begin + what + rest``, unless a warning has had ``what`` before, at another task or with other numbers."""
    if not any(what in warning for warning in run.log.warnings):
        run.log.warn(begin + what + rest)
