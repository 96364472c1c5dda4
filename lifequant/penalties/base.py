"""What a penalty is, and what ProxQ's forms have in common.

ProxQ penalizes the squared distance of the quantized weights from those at the end of the former task, weighted by the
expected squared gradient: L_Prox = E ||(w_t^q - w_s^q) dL/dw^q||^2 (LifeQuant, ICCV 2023). The expectation is over replay
data, never over test data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lifequant.data.task import Task
from lifequant.methods.base import TrainingHooks
from lifequant.methods.growth import grown, only_old
from lifequant.methods.importance import CHUNK, at_quantized_weights, per_sample
from lifequant.methods.rounding import nbytes, rounded
from lifequant.qat.packing import packed_bytes
from lifequant.qat.weights import body_weights
from lifequant.quantizers.base import FakeQuant


class Penalty(TrainingHooks):
    """The base of all penalties. One that is chosen by ``--penalty`` takes the place of the method's own.

    ``--ll_lambda`` multiplies ``penalty`` and ``output_penalty``; ``default_lambda`` is its value unless a flag gives one.
    """

    has_penalty = True
    default_lambda = 0.0


class Anchored(Penalty):
    """Sum of importance * (w - anchor)^2. A form says what w is, and estimates the importance when a task begins.

    The anchor is kept as integer codes and a scale where their product is exact, else as values and the scale 1. All tensors
    are allocated at the first task and then written in place, so that a compiled step need not be compiled again. What has
    grown before ``begin_task`` has importance 0 in its new entries.
    """

    keeps_importances = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.scale: dict[str, Tensor] = {}
        self.anchor_bytes = 0
        self.bits: int = getattr(config, "importance_bits", 32)  # a loop of one's own may have another config

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """{name: w} that is held near its former value: here the quantized weights of all layers but the head."""
        return {w.name: w.quantized() for w in body_weights(model)}

    def anchors(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (anchor, scale)} whose product is ``values``, bit for bit."""
        return {w.name: codes_and_scale(w.quant, w.tensor) for w in body_weights(model)}

    def anchored(self, name: str) -> Tensor:
        """The former value of ``values(model)[name]``."""
        return self.anchor[name] * self.scale[name]

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        """{name: importance} at the former task's weights, with all factors but lambda; None for no penalty."""
        raise NotImplementedError

    def begin_task(self, model: nn.Module, task: Task) -> None:
        with torch.no_grad():
            anchors = self.anchors(model)
        if not self.anchor:
            self.importance = {name: torch.zeros_like(a, dtype=scale.dtype) for name, (a, scale) in anchors.items()}
            self.anchor = {name: anchor.clone() for name, (anchor, _) in anchors.items()}
            self.scale = {name: scale.clone() for name, (_, scale) in anchors.items()}
            self.anchor_bytes = sum(packed_bytes(w.quant, w.tensor) for w in body_weights(model))
        former = {name: anchor.shape for name, anchor in self.anchor.items()}
        estimate = self.estimate(model, task) if task.task_index > 0 else None
        with torch.no_grad():
            for name, (anchor, scale) in anchors.items():
                if changed := former.get(name) != anchor.shape:
                    self._resize(name, anchor, scale)
                new = estimate[name] if estimate else torch.zeros_like(self.importance[name])
                self.importance[name].copy_(rounded(new, self.bits, unsigned=True))
                if changed:
                    self.importance[name].copy_(only_old(self.importance[name], former.get(name)))
                self.anchor[name].copy_(anchor)
                self.scale[name].copy_(scale)

    def _resize(self, name: str, anchor: Tensor, scale: Tensor) -> None:
        """New tensors for a value that has grown, or that is new."""
        if name in self.anchor:
            grown(self.anchor[name], anchor, name)  # refuses what has shrunk
        self.importance[name] = torch.zeros_like(anchor, dtype=scale.dtype)
        self.anchor[name], self.scale[name] = anchor.clone(), scale.clone()

    def penalty(self, model: nn.Module) -> Tensor:
        values = self.values(model)
        return sum((self.importance[name] * (v - self.anchored(name)).square()).sum() for name, v in values.items())

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("importance", "anchor", "scale", "anchor_bytes")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("importance", "anchor", "scale", "anchor_bytes"):
            setattr(self, name, state[name])

    def memory_bytes(self) -> dict[str, int]:
        """Importances at ``--importance_bits``; the anchor at the bit-width of the weights that it repeats."""
        values = sum(f.numel() for f in self.importance.values())
        importance = nbytes(values, len(self.importance), self.bits)
        return {"importance": importance, "reference": self.anchor_bytes}


def codes_and_scale(quant: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale) or (values, 1) of a quantized weight: their product is this, bit for bit."""
    weight = weight.detach()
    if isinstance(quant, FakeQuant) and quant.linear and quant.output_gain is None:
        return quant.codes(weight).to(torch.int8), quant.broadcast_channels(quant.scale(), weight)
    return quant(weight).detach(), weight.new_ones(())


def fisher_of_removed_classes(model: nn.Module, task: Task) -> tuple[dict[str, Tensor] | None, float]:
    """(per-sample F on replay of the classes that the new task no longer has, kappa), or (None, 0) if there are none."""
    current = torch.zeros(task.num_classes, dtype=torch.bool, device=task.labels.device)
    current[task.classes] = True
    rows = task.replay[~current[task.labels[task.replay]]]
    missing = int((~current[task.labels[task.past_rows]]).sum()) - len(rows)
    if missing == 0 or not has_replay(task, len(rows)):
        return None, 0.0
    return per_sample(at_quantized_weights(model), task.batches(rows, CHUNK)), missing / len(task.pool)


def has_replay(task: Task, images: int) -> bool:
    """Whether there is replay data to estimate from; warns if there is none."""
    if images == 0:
        task.warn(f"{task.name}: no replay image to estimate the penalty from: it is 0")
    return images > 0
