"""What a lifelong method is: hooks around THE training step of train.py.

``TrainingHooks`` is what a method and a penalty (lifequant/penalties/) have in common; every hook does nothing until a
subclass says otherwise.
"""

from __future__ import annotations

import argparse
from typing import Any, ClassVar

from torch import Tensor, nn

from lifequant.data.task import Batch, Task, user_task
from lifequant.losses import LOSSES
from lifequant.methods.growth import sized_like

__all__ = ["Batch", "LifelongMethod", "Task", "TrainingHooks", "user_task"]  # what a file with a method needs


class TrainingHooks:
    """Hooks that train.py calls, in the order in which they stand here, and the state that a resumed run needs."""

    name = ""
    help = ""
    has_penalty = False  # ``penalty`` or ``output_penalty`` may hold a new task down
    keeps_importances = False  # of weights, which ``--importance_bits`` rounds
    batch_separable = True  # the losses are means over images, so that several processes may share a batch
    compilable: tuple[str, ...] = ()  # own functions of tensors alone, which are compiled on a GPU where the step is

    def __init__(self, config: Any) -> None:
        self.config = config

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        """Add own flags, spelled ``--<name>_<option>``. ``config.option(name)["<option>"]`` gives the value."""

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Called before a task's first step; ``model`` is as the former task left it."""

    def penalty(self, model: nn.Module) -> Tensor:
        """Scalar, before lambda; zero where there is none."""
        return next(model.parameters()).new_zeros(())

    def output_penalty(self, logits: Tensor, batch: Batch) -> Tensor:
        """Scalar like ``penalty``, of the batch's outputs [N, C]; zero where there is none."""
        return logits.new_zeros(())

    def after_backward(self, model: nn.Module) -> None:
        """Called when gradients are there and the optimizer has not stepped yet."""

    def after_step(self, model: nn.Module, lr_ratio: float) -> None:
        """Called after the optimizer's step; ``lr_ratio`` is the learning rate over its highest value."""

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Called after a task's last step."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: anything that torch gives back from a file that it reads as data only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""

    def bytes_per_image(self, num_classes: int) -> int:
        """Bytes of ``memory_bytes``, there under ``logits``, that each stored image brings with it."""
        return 0

    def memory_bytes(self) -> dict[str, int]:
        """Bytes that are kept between tasks beside the model and the replay images, under any names.

        ``importance``, ``reference`` (former weights or a former model) and ``logits`` are the usual ones.
        """
        return {}


class LifelongMethod(TrainingHooks):
    """The base of all methods: no protection. ``defaults`` are the settings of a run that gives no flag for them."""

    joint = False  # all tasks at once
    regularizer = False  # protects by a penalty alone, which hardly helps where tasks share outputs; a run says so
    needs_teacher = False  # wants Batch.teacher
    per_step_state = False  # gathers state at every step, so that a run can't be forked from another method's
    defaults: ClassVar[dict[str, Any]] = {
        "quantizer": "lsq",
        "loss": "ce",
        "sampler": "uniform",
        "penalty": "none",
        "replay": False,
        "replay_batch": 0.0,
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.loss = LOSSES[config.loss]
        self.counts: Tensor | None = None  # float32 [C], images of each class that an epoch draws

    def begin_task(self, model: nn.Module, task: Task) -> None:
        self.counts = sized_like(self.counts, task.counts)
        self.counts.copy_(task.counts)  # in place, so that a compiled step goes on with it

    def task_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Scalar loss of [N, C] logits."""
        return self.loss(logits, batch.y, self.counts)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]
