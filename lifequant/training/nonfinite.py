"""Numbers that go wrong: a step whose losses, gradients, weights or BatchNorm statistics are not finite changes nothing.

With ``--on_nan stop`` the run writes the state of before that step and ends; with ``skip`` it leaves the step out and
counts it. What counts as not finite is NaN, infinity, and what LIMIT is exceeded by: a number so large that the next update
may overflow, so that the state of before is one whose numbers are all finite.

On the CPU, and with ``skip`` on a GPU, each step is looked at after its backward pass, before anything but BatchNorm's
running statistics has changed, and these are put back. On a GPU that is a synchronization at each step, so ``stop`` does
without: the largest number since the last reading (--print_freq) stays on the device, and is read with the losses. Where it
is not finite the run goes back to the state at the reading before, of which a copy is kept on the device, and does these
steps again, looked at one by one. A checkpoint that falls due meanwhile is that copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lifequant.common.errors import UserError
from lifequant.runtime import distributed
from lifequant.training.diagnosis import diagnose

if TYPE_CHECKING:
    from lifequant.config import Config
    from lifequant.data.task import Batch
    from lifequant.training.run import Run

LIMIT = 1e18  # of a diverged run alone; its square is finite in float32, which ends at 3.4e38
MOST_IN_A_ROW = 100  # steps left out one after another: nothing is being learned any more
REMEDY = "a smaller --lr, --ll_lambda or --step_lr"


class Watch:
    """Looks at each step's numbers. About 1 ms a step of ResNet-20 on a CPU, 0.3 % at batches of 128; ``late``: no device synchronization."""

    def __init__(self, config: Config, model: nn.Module, device: torch.device) -> None:
        self.skips = config.on_nan == "skip"
        self.late = device.type == "cuda" and not self.skips
        self.decay = config.weight_decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = list(model.buffers())
        self.floating = [b for b in self.buffers if b.is_floating_point()]
        self.former = [torch.empty_like(b) for b in self.buffers]
        self.largest = torch.zeros((), device=device)  # since the last reading, where it is read late
        self.kept: dict[str, Any] | None = None  # the state at the last reading, the same

    @torch.no_grad()
    def before(self) -> None:
        """Before the forward pass, which changes BatchNorm's running statistics."""
        if not self.late and self.buffers:
            torch._foreach_copy_(self.former, self.buffers)

    @torch.no_grad()
    def fine(self, losses: list[Tensor], lr: float) -> bool:
        """Whether all is finite, after the backward pass; True, and seen later, where it is read late."""
        number = self._largest(losses, lr)
        if self.late:
            self.largest = torch.maximum(self.largest, number)  # NaN stays
            return True
        return number.item() <= LIMIT  # NaN is not

    def _largest(self, losses: list[Tensor], lr: float) -> Tensor:
        """A bound on all that this step makes, NaN where something is: scalar float32, of all processes alike."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        weight, gradient = largest(self.parameters), largest(gradients)
        others = largest([*self.floating, *losses])
        after = weight + max(lr, 1.0) * (gradient + self.decay * weight)
        return distributed.total(torch.maximum(after, others))

    @torch.no_grad()
    def put_back(self) -> None:
        """BatchNorm's running statistics as before the forward pass."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.former)

    def bad(self) -> bool:
        """Whether a number since the last reading was not finite, where it is read late; a device synchronization."""
        return self.late and not self.largest.item() <= LIMIT

    def keep(self, run: Run) -> None:
        """A reading went well: remember the state, where it may be needed."""
        if self.late:
            since = run.timer.checkpoint
            self.largest.zero_()
            self.kept = copy.deepcopy({name: value for name, value in run.state().items() if name != "history"})
            run.timer.checkpoint = since  # this is no checkpoint

    def state(self, run: Run) -> dict[str, Any] | None:
        """The state that a checkpoint is to hold instead of the present one, which is not finite; None as a rule."""
        return {**self.kept, "history": run.history} if self.kept is not None and self.bad() else None

    def go_back(self, run: Run) -> None:
        """To the last reading; from here on each step is looked at."""
        clock = run.timer
        run.load({**self.kept, "history": run.history, "warnings": run.log.warnings}, Path(run.config.job_dir))
        run.timer, self.late, self.kept = clock, False, None


def largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in dense tensors of one type and device, NaN where there is one: scalar. No synchronization."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors, torch.inf)).amax()
    # In the order of memory, whatever the layout: half the time of a norm each, on a CPU.
    least, most = torch.cat([t.as_strided((t.numel(),), (1,)) for t in tensors]).aminmax()
    return torch.maximum(-least, most)


def skip_step(run: Run, batch: Batch, save: Callable[[Run], None]) -> Tensor:
    """What becomes of a step that is not finite: no change, sums of 0 (results.step_sums), or, after ``save``, UserError."""
    task_id, step = run.data.ids[run.task_index], run.step
    why = diagnose(run, batch)
    run.optimizer.zero_grad()
    run.watch.put_back()
    skipped = run.history.get("skipped", {"steps": 0, "in_a_row": 0, "last": None})
    in_a_row = skipped["in_a_row"] if skipped["last"] == [run.task_index, step - 1] else 0
    if not run.watch.skips or in_a_row == MOST_IN_A_ROW:
        raise _stopped(run, f"the run diverged in task {task_id}, step {step}: {why}", save)
    run.history["skipped"] = {"steps": skipped["steps"] + 1, "in_a_row": in_a_row + 1, "last": [run.task_index, step]}
    if skipped["steps"] == 0:
        run.log.warn(
            f"steps that are not finite are left out (--on_nan skip; skipped_steps counts them), the first in task {task_id}, "
            f"step {step}: {why}"
        )
    else:
        run.log.note(f"task {task_id}, step {step} is left out: {why}")
    return torch.zeros_like(run.sums)


def _stopped(run: Run, what: str, save: Callable[[Run], None]) -> UserError:
    if run.step:  # else the last checkpoint is it, or nothing has been trained
        save(run)
        run.writer.wait()
        kept = "the state before that step is kept"
    elif run.task_index:
        kept = "the task before is kept"
    else:
        kept = "nothing was trained before"
    again = (
        f"after {MOST_IN_A_ROW} steps left out in a row"
        if run.watch.skips
        else "--resume --on_nan skip leaves the step out"
    )
    run.log.note(what)
    return UserError(
        f"{run.config.job_dir}: {what}. {kept[0].upper()}{kept[1:]}; {again}; else begin anew with {REMEDY}"
    )
