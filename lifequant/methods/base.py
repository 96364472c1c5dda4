"""What a lifelong method is: callbacks around THE training step of train.py. The base is no protection; every hook a no-op.

A penalty (lifequant/penalties.py) has the same callbacks; where one is chosen it takes the place of the method's own.
"""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lifequant.data.task import Batch, Task
from lifequant.losses import LOSSES


class LifelongMethod:
    """Base: no protection. ``parts`` are what the method uses unless a flag says otherwise."""

    name = ""
    help = ""
    joint = False  # all tasks at once
    has_penalty = False  # has a penalty, which may hold a new task down
    regularizer = False  # protects by a penalty alone, which at shared outputs hardly helps; a run says so
    needs_teacher = False  # wants Batch.teacher
    batch_separable = True  # its losses are means over images, so that processes may share out a batch
    per_step_state = False  # gathers state at every step, so that a run can't be forked from another method's
    defaults: ClassVar[dict[str, Any]] = {
        "quantizer": "lsq",
        "loss": "ce",
        "sampler": "uniform",
        "penalty": "none",
        "replay": False,
    }

    def __init__(self, config: Any) -> None:
        self.config = config
        self.loss = LOSSES[config.loss]
        self.counts: Tensor | None = None

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        """Add the method's own flags, spelled ``--<name>_<option>``."""

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Before a task's first step; ``model`` is as the former task left it."""
        if self.counts is None:
            self.counts = torch.empty_like(task.counts)
        self.counts.copy_(task.counts)  # in place, so that a compiled step goes on with it

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of [N, C] logits."""
        return self.loss(logits, batch.y, self.counts)

    def penalty(self, model: nn.Module) -> Tensor:
        """Scalar, before lambda; zero where there is none."""
        return next(model.parameters()).new_zeros(())

    def output_penalty(self, logits: Tensor, batch: Batch) -> Tensor:
        """Scalar like ``penalty``, of the batch's outputs; zero where there is none."""
        return logits.new_zeros(())

    def after_backward(self, model: nn.Module) -> None:
        """Gradients are there, the step is not yet done."""

    def after_step(self, model: nn.Module, lr_ratio: float) -> None:
        """The step is done; ``lr_ratio`` is the learning rate over its highest value."""

    def end_task(self, model: nn.Module, task: Task) -> None:
        """After a task's last step."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; what a resumed run needs."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]

    def memory_bytes(self) -> dict[str, int]:
        """Bytes kept between tasks beside model and replay images: any of ``importance``, ``reference`` (former weights
        or a former model), ``logits``."""
        return {}
