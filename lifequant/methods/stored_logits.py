"""Logits kept with replay images, in half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lifequant.data.task import Batch, Task
from lifequant.qat.modes import eval_mode


class StoredLogits:
    """A table with a row for each row of the image store. ``held`` marks the rows that have logits. Both are written in place."""

    def __init__(self) -> None:
        self.table: Tensor | None = None  # float16 [rows, C]
        self.held: Tensor | None = None  # bool [rows]
        self.width: Tensor | None = None  # int64 [rows], classes of the head at a row's logits; None: never grown
        self.known = 0  # classes of the head in the task before, by which the present model was trained

    @torch.no_grad()
    def update(self, model: nn.Module, task: Task, recompute: bool) -> None:
        """When a task begins, compute the logits of replay images, in eval mode and without augmentation.

        ``recompute`` replaces the logits of all replay images; without it, only images that have none get them. An image that
        is neither stored nor new any more loses its logits.
        """
        self._fit(task)
        if recompute or not task.stable_rows:
            self.held.zero_()
        kept = torch.zeros_like(self.held)
        kept[task.pool] = True
        self.held &= kept
        rows = task.replay[~self.held[task.replay]]
        with eval_mode(model):
            for part in rows.split(task.batch_size) if len(rows) else ():
                self.table[part] = model(task.batch(part)[0]).half()
        self.held[rows] = True
        if self.width is not None:
            self.width[rows] = self.known
        self.known = task.num_classes

    def _fit(self, task: Task) -> None:
        """Allocate the tensors for the task's rows and classes. Logits of rows that last are kept when classes are added."""
        shape, device = (len(task.images), task.num_classes), task.labels.device
        former = self.table
        self.known = shape[1] if former is None else self.known
        if former is not None and former.shape == shape:
            return
        self.table = torch.zeros(shape, dtype=torch.float16, device=device)
        if former is not None and self.width is None and shape[1] > former.shape[1]:
            self.width = torch.full((len(former),), former.shape[1], device=device)
        lasts = former is not None and task.stable_rows and len(former) == shape[0] and former.shape[1] < shape[1]
        if lasts:
            self.table[:, : former.shape[1]] = former
            return
        self.held = torch.zeros(shape[0], dtype=torch.bool, device=device)
        if self.width is not None:
            self.width = torch.zeros(shape[0], dtype=torch.int64, device=device)

    def distance(self, logits: Tensor, batch: Batch, known: Tensor | None = None) -> Tensor:
        """Scalar: mean over the batch's replay images of the squared distance of logits [N, C] from the stored ones,
        summed over classes, or over those in ``known`` (bool [C]); 0 without a replay image. Classes that the head did not
        have when an image's logits were stored take no part."""
        chosen = (batch.is_replay & self.held[batch.rows])[:, None]
        difference = logits - self.table[batch.rows].to(logits.dtype)
        keep = chosen if known is None else chosen & known
        if self.width is not None:
            keep = keep & (torch.arange(logits.shape[1], device=logits.device) < self.width[batch.rows][:, None])
        return torch.where(keep, difference, 0).square().sum() / chosen.sum().clamp(min=1)

    def bytes_per_image(self, num_classes: int) -> int:
        """Bytes of an image's logits."""
        return 2 * num_classes

    def nbytes(self) -> int:
        """Bytes of the logits held."""
        return 0 if self.table is None else int(self.held.sum()) * self.table.shape[1] * self.table.element_size()

    def state_dict(self) -> dict[str, Any]:
        if self.table is None:
            return {}
        rows = self.held.nonzero()[:, 0]
        state = {"shape": list(self.table.shape), "rows": rows, "logits": self.table[rows]}
        return state if self.width is None else state | {"width": self.width[rows], "known": self.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            self.table = self.held = self.width = None
            return
        self.table = torch.zeros(state["shape"], dtype=torch.float16, device=state["rows"].device)
        self.held = torch.zeros(len(self.table), dtype=torch.bool, device=state["rows"].device)
        self.table[state["rows"]] = state["logits"]
        self.held[state["rows"]] = True
        self.known, self.width = state.get("known", state["shape"][1]), None
        if "width" in state:
            self.width = torch.zeros(len(self.table), dtype=torch.int64, device=state["rows"].device)
            self.width[state["rows"]] = state["width"]
