"""What a run refuses, and what it warns of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lifequant.diagnosis import diagnose_evaluation
from lifequant.errors import UserError
from lifequant.quantizers.base import STEP_FLOOR
from lifequant.quantizers.layers import fake_quants

if TYPE_CHECKING:
    from lifequant.state import Run

MUCH_BOUNDED = 0.05  # of the updates of a step size


def refuse_divergence(run: Run, value: float, evaluated: bool = False) -> None:
    """Raises UserError where a mean loss, or what a model says of test images, is not finite; see finite.py for steps."""
    if not math.isfinite(value):
        why = diagnose_evaluation(run) if evaluated else "the mean loss is not finite"
        raise UserError(
            f"{run.config.job_dir}: the run diverged in task {run.data.ids[run.place]}, step {run.step}: "
            f"{why}. No step can be left out for it; begin anew with a smaller --lr, --ll_lambda or --step_lr"
        )


def warn_of(run: Run, place: int) -> None:
    """Warn of a penalty that dwarfs the loss or holds the new task down, and of steps at their floor.

    Held down: the newest task, judged among its own classes, is learnt less well than 0.8 times the first was. (Overall
    accuracy would not do: it falls as the classes of former tasks compete.)
    """
    now, masked = run.history["training"][-1], run.history["top1_masked"]
    remedy = f"a smaller --ll_lambda than {run.config.ll_lambda:g} may do better"
    if now["penalty"] > now["task_loss"]:
        run.log.warn(
            f"task {place}: the penalty ({now['penalty']:.3g}) is larger than the task loss ({now['task_loss']:.3g}): {remedy}"
        )
    elif run.guard.holds_down and place > 0 and masked[place][place] < 0.8 * masked[0][0]:
        run.log.warn(
            f"task {place} is learnt to {masked[place][place]:.1f} % (task-masked) where the first was to {masked[0][0]:.1f} %: "
            f"the penalty holds it down, or it is harder; {remedy}"
        )
    for name, updates in run.steps.most_bounded().items():
        if updates > MUCH_BOUNDED * run.step:
            run.log.warn(
                f"task {place}: the step size of {name} would have changed by more than a tenth at {updates} of {run.step} updates, "
                "and was held to that: a smaller --lr or --step_lr may do better"
            )
    for name, quant in fake_quants(run.model):
        if quant.step().min().item() <= STEP_FLOOR:
            run.log.warn(
                f"task {place}: the step size of {name} is at its floor: this layer has stopped quantizing sensibly"
            )
