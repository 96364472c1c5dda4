"""The base of methods that hold each weight near its former value, in proportion to its importance."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Size, Tensor, nn

from lifequant.common.arguments import int_at_least
from lifequant.common.errors import UserError
from lifequant.data.task import Task
from lifequant.methods.base import LifelongMethod
from lifequant.methods.growth import grown_flat
from lifequant.methods.importance import Batches, flat, protected
from lifequant.methods.rounding import nbytes, rounded_flat


class Regularizer(LifelongMethod):
    """Penalty sum_i importance_i (w_i - anchor_i)^2 + offset over the latent weights, before lambda.

    The w_i are all parameters but the quantizers' own. Importance and anchor are vectors over all of them; they are
    allocated at the first task and then written in place, so that a compiled step need not be compiled again. ``estimate``
    gives the importances for a task that has ended. If another penalty is chosen, nothing is gathered.

    A parameter may have grown before ``begin_task``, as a head for more classes does: its first entries keep their
    importance and anchor, and new ones have importance 0. ``--importance_bits`` rounds both where a task ends.
    """

    has_penalty = True
    regularizer = keeps_importances = True
    importances: tuple[str, ...] = ("importance",)  # the vectors that are kept, beside the anchor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.used = config.penalty == "none"
        self.anchor: Tensor | None = None  # the weights at the end of the former task; in the first, at its begin
        self.offset: Tensor | None = None
        self.shapes: dict[str, Size] = {}  # of the parameters, in the order of the vectors
        for name in self.importances:
            setattr(self, name, None)

    @staticmethod
    def images_flag(group: argparse._ArgumentGroup, method: str, images: int) -> None:
        """Add ``--<method>_images``."""
        group.add_argument(
            f"--{method}_images",
            type=int_at_least(1),
            metavar="N",
            default=images,
            help="at most so many images, evenly spaced over the task's own, to estimate importances from",
        )

    def option(self, name: str) -> Any:
        """The value of ``--<method>_<name>``."""
        return self.config.option(self.name)[name]

    def batches(self, task: Task, size: int) -> Batches:
        """Batches of the task's own training images, not augmented: at most ``--<method>_images``, evenly spaced."""
        count = min(self.option("images"), len(task.new_rows))
        rows = task.new_rows[torch.arange(count, device=task.new_rows.device) * len(task.new_rows) // count]
        return task.batches(rows, size)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        super().begin_task(model, task)
        if self.used and self.anchor is None:
            self.anchor = flat(protected(model).values()).detach()
            self.offset = self.anchor.new_zeros(())
            for name in self.importances:
                setattr(self, name, torch.zeros_like(self.anchor))
        elif self.used and self.shapes:
            self._grow(model)
        self.shapes = {name: p.shape for name, p in protected(model).items()} if self.used else {}

    def _grow(self, model: nn.Module) -> None:
        """Fit all vectors to the parameters as they are now, if any has another shape, name or place."""
        weights = {name: p.detach() for name, p in protected(model).items()}
        if list(self.shapes.items()) == [(name, w.shape) for name, w in weights.items()]:
            return
        zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
        for name in self.importances:
            setattr(self, name, grown_flat(getattr(self, name), self.shapes, zeros))
        self.anchor = grown_flat(self.anchor, self.shapes, weights)

    def _same_size(self, weights: Tensor) -> Tensor:
        """``weights`` [P]. Raises UserError where it is not as long as the vectors."""
        if weights.shape != self.anchor.shape:
            raise UserError(
                f"{self.name}: the model has {len(weights)} parameters and had {len(self.anchor)} as the task began: let it grow "
                "before begin_task, which takes over what is kept"
            )
        return weights

    def penalty(self, model: nn.Module) -> Tensor:
        if self.anchor is None:
            return super().penalty(model)
        return (
            self.importance * (self._same_size(flat(protected(model).values())) - self.anchor).square()
        ).sum() + self.offset

    def end_task(self, model: nn.Module, task: Task) -> None:
        super().end_task(model, task)
        if self.used:
            self._same_size(flat(protected(model).values()))
            new = self.estimate(model, task)
            with torch.no_grad():
                self.merge(new, flat(protected(model).values()), task)
                if (bits := self.config.importance_bits) < 32:
                    sizes = [shape.numel() for shape in self.shapes.values()]
                    self.importance.copy_(rounded_flat(self.importance, sizes, bits, unsigned=True))
                    self.anchor.copy_(rounded_flat(self.anchor, sizes, bits))

    def estimate(self, model: nn.Module, task: Task) -> Tensor:
        """[P], the importances for the task that has ended."""
        raise NotImplementedError

    def merge(self, new: Tensor, weights: Tensor, task: Task) -> None:
        """Merge the importances ``new`` at ``weights``. Here importances are added up, and the anchor becomes ``weights``."""
        self.importance += new
        self.anchor.copy_(weights)

    @torch.no_grad()
    def gradient_and_weights(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """([P], the gradient of the task loss alone: p.grad without lambda 2 importance (w - anchor); [P], the weights)."""
        parameters = protected(model).values()
        gradient = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        weights = flat(parameters)
        return gradient - 2 * self.config.ll_lambda * self.importance * (weights - self.anchor), weights

    def state_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("anchor", "offset", *self.importances)}
        return super().state_dict() | kept | {"shapes": {name: list(shape) for name, shape in self.shapes.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in ("anchor", "offset", *self.importances):
            setattr(self, name, state[name])
        # A state that was saved before there were shapes has none: then the parameters are taken to be the same.
        self.shapes = {name: Size(shape) for name, shape in state.get("shapes", {}).items()}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of all vectors that are kept. What a method gathers during a task counts as importance."""
        if self.anchor is None:
            return {}
        bits = self.config.importance_bits
        gathered = sum(getattr(self, name).nbytes for name in self.importances if name != "importance")
        kept = self.anchor.nbytes if bits == 32 else nbytes(len(self.anchor), len(self.shapes), bits)
        return {"importance": kept + gathered + self.offset.nbytes, "reference": kept}
