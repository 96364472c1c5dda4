"""ProxQ's penalty in its forms: the squared distance of the quantized weights from those at the end of the former task,
weighted by the expected squared gradient, L_Prox = E ||(w_t^q - w_s^q) dL/dw^q||^2 (LifeQuant, ICCV 2023).

The expectation is over replay data, never over test data. A penalty has the callbacks of a lifelong method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lifequant.data.task import Batch, Task
from lifequant.methods.base import LifelongMethod
from lifequant.methods.importance import CHUNK, at_quantized_weights, conv_weights, per_batch, per_sample, protected
from lifequant.methods.stored_logits import StoredLogits
from lifequant.qat.layers import QuantConv2d, QuantLinear, weight_layers
from lifequant.qat.modes import eval_mode
from lifequant.qat.packing import packed_bytes
from lifequant.quantizers.base import FakeQuant


class Anchored(LifelongMethod):
    """Sum of importance * (w - anchor)^2. A form says what w is, and estimates the importance at a task's begin.

    The anchor is kept as integer codes and a unit, the step, where their product is exact; else as values and the unit 1.
    All are allocated at the first task and then written in place: a compiled step needs no second compilation.
    """

    has_penalty = True
    default_lambda = 0.0

    def __init__(self, config: Any) -> None:
        self.config = config
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.unit: dict[str, Tensor] = {}
        self.anchor_bytes = 0

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """What is held near its former value: here the quantized convolution weights."""
        return {
            name: layer.weight_quant(layer.weight) for name, layer in weight_layers(model) if layer.weight.dim() == 4
        }

    def kept(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """{name: (anchor, unit)} whose product is ``values``, bit for bit."""
        return {name: packed(layer) for name, layer in weight_layers(model) if layer.weight.dim() == 4}

    def former(self, name: str) -> Tensor:
        """The former value of ``values(model)[name]``."""
        return self.anchor[name] * self.unit[name]

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        """Importances at the former task's weights, all factors but lambda included; None for no penalty."""
        raise NotImplementedError

    def begin_task(self, model: nn.Module, task: Task) -> None:
        with torch.no_grad():
            kept = self.kept(model)
        if not self.anchor:
            self.importance = {name: torch.zeros_like(a, dtype=unit.dtype) for name, (a, unit) in kept.items()}
            self.anchor = {name: anchor.clone() for name, (anchor, _) in kept.items()}
            self.unit = {name: unit.clone() for name, (_, unit) in kept.items()}
            self.anchor_bytes = sum(packed_bytes(layer) for _, layer in weight_layers(model) if layer.weight.dim() == 4)
        estimate = self.estimate(model, task) if task.task_index > 0 else None
        with torch.no_grad():
            for name, (anchor, unit) in kept.items():
                self.importance[name].copy_(estimate[name]) if estimate else self.importance[name].zero_()
                self.anchor[name].copy_(anchor)
                self.unit[name].copy_(unit)

    def penalty(self, model: nn.Module) -> Tensor:
        values = self.values(model)
        return sum((self.importance[name] * (v - self.former(name)).square()).sum() for name, v in values.items())

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("importance", "anchor", "unit", "anchor_bytes")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("importance", "anchor", "unit", "anchor_bytes"):
            setattr(self, name, state[name])

    def memory_bytes(self) -> dict[str, int]:
        """Importances as held (float32), the anchor at the bit-width of what it repeats."""
        importance = sum(f.numel() * f.element_size() for f in self.importance.values())
        return {"importance": importance, "reference": self.anchor_bytes}


class ProxQ(Anchored):
    """(kappa_t / 2) sum_i F_i (w_i^q - w_{s,i}^q)^2: the Laplace reading, in which the penalty stands for missing data.

    F per sample, in eval mode, at w_s, on replay of the classes that the new task no longer has, clipped at the
    layer's 99.9 % quantile. kappa_t = (images of those classes that are gone) / (images in the pool).
    """

    default_lambda = 3.0  # the best on held-out images: resnet-20-cifar-10/results/search_strength

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        fisher, kappa = fisher_of_gone_classes(model, task)
        return fisher and {name: f.clamp(max=f.flatten().quantile(0.999)) * (kappa / 2) for name, f in fisher.items()}


class ProxQStep(Anchored):
    """A proximal step after SGD's, in the space of codes, stable for any strength k = lambda.

    With u the real-valued code and r the former integer code, d = u - r: |d| <- min(|d|, 1/2) + max(|d| - 1/2, 0) /
    (1 + k (eta_t / eta_0) Fn), Fn = F over its layer's mean, clipped at 10. Movement that changes no code is free.
    """

    default_lambda = 0.1

    def kept(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        codes = {name: layer.weight_quant.codes(layer.weight) for name, layer in self._layers(model)}
        return {name: (c, torch.ones((), device=c.device)) for name, c in codes.items()}

    @staticmethod
    def _layers(model: nn.Module) -> list[tuple[str, Any]]:
        return [
            (name, layer)
            for name, layer in weight_layers(model)
            if layer.weight.dim() == 4 and isinstance(layer.weight_quant, FakeQuant)
        ]

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        fisher, _ = fisher_of_gone_classes(model, task)
        return fisher and {name: (f / f.mean().clamp(min=1e-30)).clamp(max=10) for name, f in fisher.items()}

    def penalty(self, model: nn.Module) -> Tensor:
        return LifelongMethod.penalty(self, model)

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr_ratio: float) -> None:
        strength = self.config.ll_lambda * lr_ratio
        for name, layer in self._layers(model):
            weight, quant = layer.weight, layer.weight_quant
            former = self.former(name)
            d = quant.to_codes(weight) - former
            size = d.abs()
            beyond = (size - 0.5).clamp(min=0) / (1 + strength * self.importance[name])
            u = former + d.sign() * (size.clamp(max=0.5) + beyond)
            moved = (beyond > 0) & (self.importance[name] > 0)
            weight.copy_(torch.where(moved, quant.inverse(u, weight), weight))


class ProxQPaper(Anchored):
    """The published estimate (squared gradients of batch means, all replay data, no factor) with the paper's distance,
    that of the quantized weights."""

    default_lambda = 100.0

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        if not replay_there(task, len(task.replay)):
            return None
        net = at_quantized_weights(model)
        return per_batch(net, conv_weights(net), task.batches(task.replay, task.batch_size))


class ProxQPublished(Anchored):
    """The authors' code: lambda sum F (w - w_s)^2 over all parameters but the quantizers', latent; F of batch means on
    replay data."""

    default_lambda = 100.0

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        return dict(protected(model))

    def kept(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (value.detach(), value.new_ones(())) for name, value in self.values(model).items()}

    def estimate(self, model: nn.Module, task: Task) -> dict[str, Tensor] | None:
        if not replay_there(task, len(task.replay)):
            return None
        with eval_mode(model):
            return per_batch(model, self.values(model), task.batches(task.replay, task.batch_size))

    def memory_bytes(self) -> dict[str, int]:
        latent = sum(a.numel() * a.element_size() for a in self.anchor.values())
        return super().memory_bytes() | {"reference": latent}


class ProxQFunction(LifelongMethod):
    """The functional form: mean over the batch's replay images of ||f_t(x) - f_s(x)||^2 / |classes that s knew|, over
    those classes. Weights may move wherever old outputs do not.

    f_s are the former task's logits in eval mode of the image as it is, computed for all replay images as a task begins.
    Close to dark experience replay, which keeps the logits of an image's own task.
    """

    has_penalty = True
    batch_separable = False  # a mean over the batch's replay images alone
    default_lambda = 0.5

    def __init__(self, config: Any) -> None:
        self.config = config
        self.stored = StoredLogits()
        self.known: Tensor | None = None

    def begin_task(self, model: nn.Module, task: Task) -> None:
        self.stored.update(model, task, again=True)
        if self.known is None:
            self.known = torch.zeros_like(task.old_classes)
        self.known.copy_(task.old_classes)
        if task.task_index > 0:
            replay_there(task, len(task.replay))

    def output_penalty(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.stored.distance(logits, batch, self.known) / self.known.sum().clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        return {"known": self.known, "stored": self.stored.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.known = state["known"]
        self.stored.load_state_dict(state["stored"])

    def memory_bytes(self) -> dict[str, int]:
        return {"logits": self.stored.nbytes()}


def packed(layer: QuantConv2d | QuantLinear) -> tuple[Tensor, Tensor]:
    """(codes, unit) or (values, 1) of a layer's quantized weights: their product is these, bit for bit."""
    weight, quant = layer.weight.detach(), layer.weight_quant
    if isinstance(quant, FakeQuant) and quant.linear:
        return quant.codes(weight).to(torch.int8), quant.broadcast_channels(quant.scale(), weight)
    return quant(weight).detach(), weight.new_ones(())


def fisher_of_gone_classes(model: nn.Module, task: Task) -> tuple[dict[str, Tensor] | None, float]:
    """(per-sample F on replay of the classes that the new task no longer has, kappa), or (None, 0) if there are none."""
    current = torch.zeros(task.num_classes, dtype=torch.bool, device=task.labels.device)
    current[task.classes] = True
    rows = task.replay[~current[task.labels[task.replay]]]
    missing = int((~current[task.labels[task.past_rows]]).sum()) - len(rows)
    if missing == 0 or not replay_there(task, len(rows)):
        return None, 0.0
    return per_sample(at_quantized_weights(model), task.batches(rows, CHUNK)), missing / len(task.pool)


def replay_there(task: Task, images: int) -> bool:
    """Whether there is replay data to estimate from; warns if not."""
    if images == 0:
        task.warn(f"{task.name}: no replay image to estimate the penalty from: it is 0")
    return images > 0


PENALTIES = {
    "proxq": ProxQ,
    "proxq_step": ProxQStep,
    "proxq_paper": ProxQPaper,
    "proxq_published": ProxQPublished,
    "proxq_function": ProxQFunction,
}
