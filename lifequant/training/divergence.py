"""What becomes of a run whose numbers are not finite: it stops with one line, or skips the step (``--on_nan``)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from lifequant.common.errors import UserError
from lifequant.data.task import Batch
from lifequant.training import nonfinite
from lifequant.training.run import Run

REMEDY = "a smaller --lr, --ll_lambda or --step_lr"


def skip_step(run: Run, batch: Batch, terms: Tensor, save: Callable[[Run], None]) -> Tensor:
    """Undo a step that is not finite and count it; returns sums of 0 (history.step_sums).

    With ``--on_nan stop``, and after ``nonfinite.MOST_IN_A_ROW`` skipped steps, ``save`` writes the state before the step,
    and a UserError names the term and the layer.
    """
    where = f"task {run.data.ids[run.task_index]}, step {run.step}"
    with run.autocast():
        why = nonfinite.diagnose(run.model, dict(zip(run.term_names, terms, strict=True)), batch.x)
    run.optimizer.zero_grad()
    run.finite_check.restore_buffers()
    skipped = run.history.get("skipped", {"steps": 0, "in_a_row": 0, "last": None})
    in_a_row = skipped["in_a_row"] if skipped["last"] == [run.task_index, run.step - 1] else 0
    if run.config.on_nan == "stop":
        raise _stopped(run, f"the run diverged in {where}: {why}", "--resume --on_nan skip skips the step", save)
    if in_a_row == nonfinite.MOST_IN_A_ROW:
        raise _stopped(run, f"the run diverged in {where}: {why}", f"{in_a_row} steps in a row were skipped", save)
    run.history["skipped"] = {
        "steps": skipped["steps"] + 1,
        "in_a_row": in_a_row + 1,
        "last": [run.task_index, run.step],
    }
    if skipped["steps"] == 0:
        run.log.warn(
            f"{where} is skipped, as is each later step that is not finite (--on_nan skip; skipped_steps counts them): {why}"
        )
    else:
        run.log.note(f"{where} is skipped: {why}")
    return run.sums.new_zeros(run.sums.shape)


def _stopped(run: Run, what: str, again: str, save: Callable[[Run], None]) -> UserError:
    if run.step:
        save(run)
        run.writer.wait()
        kept = "The state before that step is kept"
    elif run.task_index:
        kept = "The task before is kept"
    else:
        kept = "Nothing was trained before"
    run.log.note(what)
    return UserError(f"{run.config.job_dir}: {what}. {kept}; {again}; else begin anew with {REMEDY}")


def stop_at_last_checkpoint(run: Run) -> None:
    """Raises UserError where a deferred check (on a GPU) has found a step that was not finite."""
    if run.finite_check.found_nonfinite(run.sums, run.optimizer):
        raise UserError(
            f"{run.config.job_dir}: the run diverged in task {run.data.ids[run.task_index]}, at most "
            f"{run.reading_interval} steps before step {run.step}. The last checkpoint is kept; --resume --on_nan skip goes "
            f"on from it and skips such steps; else begin anew with {REMEDY}"
        )


def refuse_nonfinite(run: Run, value: float, what: str) -> None:
    """Raises UserError where ``value``, a mean over steps or test images, is not finite."""
    if not math.isfinite(value):
        raise UserError(
            f"{run.config.job_dir}: the run diverged in task {run.data.ids[run.task_index]}, step {run.step}: {what} is not "
            f"finite. No step can be skipped for it; begin anew with {REMEDY}"
        )
