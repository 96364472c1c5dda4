"""Steps whose numbers are NaN, infinite, or so large that the next update may overflow.

On the CPU, and with ``--on_nan skip``, each step is checked between its backward pass and its update, when only BatchNorm's
running statistics have changed; ``restore_buffers`` puts those back, so the state is the one before the step. A GPU would
have to wait for that at every step, so ``--on_nan stop`` looks there, with each reading of the losses, at what a step that was
not finite leaves behind: weights, running statistics, the optimizer's state, sums of losses. The run stops at its last
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lifequant.config import Config
from lifequant.runtime import distributed

LIMIT = 1e18  # only a diverged run gets here; the square of it is still finite in float32
MOST_IN_A_ROW = 100  # a run that skips more steps one after another learns nothing any more


class FiniteCheck:
    """Checks the numbers of each step; about 1 ms a step of ResNet-20 on a CPU, 0.3 % at batches of 128."""

    def __init__(self, config: Config, model: nn.Module, device: torch.device) -> None:
        self.deferred = device.type == "cuda" and config.on_nan == "stop"
        self.decay = config.weight_decay
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = list(model.buffers())
        self.saved = [torch.empty_like(b) for b in self.buffers]

    @torch.no_grad()
    def before_step(self) -> None:
        """Save BatchNorm's running statistics, which the forward pass changes."""
        if self.buffers and not self.deferred:
            torch._foreach_copy_(self.saved, self.buffers)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put back what ``before_step`` saved."""
        if self.buffers and not self.deferred:
            torch._foreach_copy_(self.buffers, self.saved)

    @torch.no_grad()
    def is_finite(self, losses: Tensor, lr: float) -> bool:
        """Whether the step may go on, after the backward pass; always True where the check is deferred."""
        if self.deferred:
            return True
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        weight = largest(self.parameters)
        after_update = weight + max(lr, 1.0) * (largest(gradients) + self.decay * weight)
        others = largest([*(b for b in self.buffers if b.is_floating_point()), losses])
        number = distributed.total(torch.maximum(after_update, others))
        return number.item() <= LIMIT  # False for NaN

    @torch.no_grad()
    def found_nonfinite(self, sums: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step since the last call was not finite, where the check is deferred; waits for the device.

        What is not finite stays so in a weight or a running statistic, an infinite gradient in the momentum.
        """
        if not self.deferred:
            return False
        kept = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        every = [sums, *self.parameters, *self.buffers, *(t for t in kept if t.device == sums.device)]
        return not largest([t for t in every if t.is_floating_point()]).item() <= LIMIT


def largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in dense tensors of one type and device, NaN where there is one: a scalar on the device."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors, torch.inf)).amax()
    # In the order of memory, whatever the layout: on a CPU that takes half the time of a norm of each.
    least, most = torch.cat([t.as_strided((t.numel(),), (1,)) for t in tensors]).aminmax()
    return torch.maximum(-least, most)


def diagnose(model: nn.Module, terms: Mapping[str, Tensor], x: Tensor) -> str:
    """One line on a step that went wrong: the loss terms, then the first weight, layer output or gradient that is not finite.

    ``terms`` are the loss terms as they were added up; ``x`` is the batch, which passes the network once more.
    """
    values = {name.replace("_", " "): value.item() for name, value in terms.items()}
    said = [f"the {name} is {value:g}" for name, value in values.items() if not torch.tensor(value).isfinite()]
    if not said:
        name = max(values, key=lambda name: abs(values[name]))
        said = [f"the largest term of the loss is the {name} ({values[name]:g})"]
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if weight := _first_nonfinite(model.named_parameters()):
        where = f"{weight} itself is not finite"
    elif layer := first_nonfinite_layer(model, x):
        where = f"the first layer with an output that is not finite is {layer}"
    elif gradient := _first_nonfinite(reversed(gradients)):  # the backward pass begins at the last layer
        where = f"the first gradient that is not finite is that of {gradient}"
    else:
        name, value = max(gradients, key=lambda entry: entry[1].abs().max().item())
        where = f"all is finite before the update; the largest gradient is that of {name} ({value.abs().max():.3g})"
    return f"{', '.join(said)}; {where}"


@torch.no_grad()
def first_nonfinite_layer(model: nn.Module, x: Tensor) -> str | None:
    """The name of the first module whose output for ``x`` is not finite; None where all outputs are."""
    outputs: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: outputs.append((name or "the network", output)))
        for name, module in model.named_modules()
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return _first_nonfinite((name, output) for name, output in outputs if torch.is_tensor(output))


def _first_nonfinite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((name for name, value in named if not value.isfinite().all()), None)
