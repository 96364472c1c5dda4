"""Where a step's numbers went wrong: the loss term, and the layer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lifequant.data.augment import normalize
from lifequant.data.image_storage import take
from lifequant.losses import distillation
from lifequant.qat.layers import no_rounding
from lifequant.qat.modes import preserve_state

if TYPE_CHECKING:
    from lifequant.data.task import Batch
    from lifequant.training.run import Run


def diagnose(run: Run, batch: Batch) -> str:
    """One line on a step that went wrong: its loss terms, and the first layer of which something is not finite.

    Called after the backward pass, before the update; computes the forward pass of ``batch`` once more, without torch.compile,
    and changes nothing of the run.
    """
    batch = run.with_teacher(batch)
    with preserve_state(run.model), run.autocast():
        logits, output = watched_forward(run.model, batch.x)
    terms = loss_terms(run, logits.float(), batch)
    bad = [f"the {name} is {value:g}" for name, value in terms.items() if not is_finite(value)]
    said = bad or [
        "the largest term of the loss is the {} ({:g})".format(*max(terms.items(), key=lambda kv: abs(kv[1])))
    ]
    weight = first_bad(run.model.named_parameters())
    gradients = [(name, p.grad) for name, p in run.model.named_parameters() if p.grad is not None]
    gradient = first_bad(reversed(gradients))  # the backward pass begins at the last layer
    buffer = first_bad(run.model.named_buffers())
    if weight:
        where = f"{weight} itself is not finite"
    elif output:
        where = f"the first layer with an output that is not finite is {output}"
    elif gradient:
        where = f"the first gradient that is not finite is that of {gradient}"
    elif buffer:
        where = f"{buffer} is not finite"
    else:
        values = [("gradient", *pair) for pair in gradients] + [
            ("value", *pair) for pair in run.model.named_parameters()
        ]
        kind, name, value = max(values, key=lambda entry: largest(entry[2]))
        where = f"before the update all is finite; the largest {kind} is that of {name} ({largest(value):.3g})"
    return f"{', '.join(said)}; {where}"


def diagnose_evaluation(run: Run) -> str:
    """One line on test images of which what the model computes is not finite."""
    store = run.data.test
    for how, context in (("", nullcontext()), (" with rounding and clamping off", no_rounding(run.model))):
        with context, preserve_state(run.model, train=False):
            for rows in torch.arange(len(store.paths)).split(run.config.eval_batch_size):
                x = normalize(take(store.images, rows, run.device))
                if layer := watched_forward(run.model.eval(), x)[1]:
                    return f"of test images{how} the first layer with an output that is not finite is {layer}"
    return "the quantization error of test images is too large for float32"


def is_finite(value: float | Tensor) -> bool:
    return bool(torch.isfinite(torch.as_tensor(value)).all())


def largest(value: Tensor) -> float:
    return value.detach().abs().max().item()


def first_bad(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with NaN or infinity."""
    return next((name for name, value in named if not is_finite(value.detach())), None)


@torch.no_grad()
def watched_forward(model: nn.Module, x: Tensor) -> tuple[Tensor, str | None]:
    """(logits [N, C], the module whose output was the first that is not finite, None where all are finite)."""
    found: list[str] = []

    def look(name: str, output: object) -> None:
        if not found and torch.is_tensor(output) and not is_finite(output):
            found.append(name or "the network")

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return logits, found[0] if found else None


@torch.no_grad()
def loss_terms(run: Run, logits: Tensor, batch: Batch) -> dict[str, float]:
    """{term: its value as it enters the loss}, zero terms left out but for the task loss."""
    config, method = run.config, run.method
    plain = method.loss(logits, batch.y, method.counts)
    own = method.task_loss(logits, batch) - plain if is_finite(plain) else plain.new_zeros(())
    terms = {"task loss": plain, f"own term of {config.method}": own}
    if config.distill and batch.teacher is not None:
        old = distillation(logits, batch.teacher, run.known, config.distill_temperature)
        terms["distillation"] = config.distill * run.known_share * old
    guard = "" if config.penalty == "none" else f" {config.penalty}"
    terms[f"penalty{guard} times ll_lambda"] = config.ll_lambda * run.guard.penalty(run.model)
    terms[f"penalty{guard} on outputs times ll_lambda"] = config.ll_lambda * run.guard.output_penalty(logits, batch)
    values = {name: float(value) for name, value in terms.items()}
    return {name: value for name, value in values.items() if value != 0 or name == "task loss"}
