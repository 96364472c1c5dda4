"""Oscillating weights are counted and frozen (Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML
2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lifequant.qat.layers import weight_layers
from lifequant.quantizers.base import FakeQuant

MOMENTUM = 0.01  # of both moving averages, as in Nagel et al. 2022
OSCILLATES = 0.005  # a weight with a higher frequency is counted as oscillating (the same)
MOST_FROZEN = 0.5  # of the weights, and of the variance, of what has codes by its own statistics
PASSES = 4  # of writing where statistics move with it; each moves them by at most about half of the one before


class Oscillations:
    """Watches the integer codes of all quantized weights during a task, and freezes weights that oscillate.

    An oscillation is a change of a weight's code in the direction OPPOSITE to its last change. Its frequency is a moving
    average over steps, with momentum 0.01 (Nagel et al. 2022, "Quantifying oscillations"). The first change of a task has no
    change before it, so it is no oscillation. ``freeze`` is a frequency in (0, 1), or None. A weight above it is frozen until
    the task ends, at the code round(moving average of its code), which includes this step's code (the same, "Iterative
    freezing"). To freeze a weight, its latent value is set to the middle of that code after each optimizer step. Layers at 32
    bits have no codes and are left out.

    Where codes depend on a weight and a scale alone (lsq), a frozen code holds after every ``after_step``. Where they depend
    on the tensor's mean and deviation (proxq), setting weights changes these. So frozen weights are set in a few passes, each
    closer than the one before, and other weights' codes may change by it, which counts as a change at the next step. At most
    half of the weights and of the variance of a tensor (of a channel with a scale of its own) is frozen there, so that the
    passes converge; other weights go on moving. What the passes leave is less than the half code that a code has to spare: for
    all quantizers at 2, 4 and 8 bits, under random steps of 3 % of the weights' deviation. With a scale for each channel (of 6
    or 27 weights, 8 bits), apot and uniform need more about once in 1,000 times.

    ``after_step`` must be the last to change weights in a step. It does not wait for a GPU. It keeps 12 bytes a weight, 16 if
    it freezes.
    """

    compilable = ("count",)

    def __init__(self, freeze: float | None = None) -> None:
        self.freeze = freeze
        self.sizes: dict[str, int] = {}  # weights of each layer, in the order of the tensors below
        # One value a weight, all layers in one tensor, so that a step is few kernels.
        self.state: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module) -> None:
        """Forget what was counted and let every weight move again: a new task must be able to learn."""
        layers = _quantized(model)
        self.sizes = {name: layer.weight.numel() for name, layer in layers.items()}
        if not layers:
            self.state = {}
            return
        codes = _codes(layers)
        self.state = {
            "code": codes,  # of a frozen weight: its code
            "direction": torch.zeros_like(codes, dtype=torch.int8),  # of the last change, 0 before the first
            "frequency": torch.zeros_like(codes, dtype=torch.float32),
            "mean_code": codes.float(),
            "frozen": torch.zeros_like(codes, dtype=torch.bool),
        }
        if self.freeze is not None:
            self.state["written"] = torch.zeros_like(codes, dtype=torch.float32)  # the weights as they were left

    def after_step(self, model: nn.Module) -> None:
        """Count this step's changes and set the frozen weights. Call it once after each optimizer step."""
        if self.state:
            self.count(model)

    @torch.no_grad()
    def count(self, model: nn.Module) -> None:
        """``after_step`` where there is something to count."""
        layers, state = _quantized(model), self.state
        codes = torch.where(state["frozen"], state["code"], _codes(layers))
        change = (codes - state["code"]).sign().to(torch.int8)
        state["frequency"].lerp_((change * state["direction"] < 0).float(), MOMENTUM)
        state["mean_code"].lerp_(codes.float(), MOMENTUM)
        state["direction"].copy_(torch.where(change == 0, state["direction"], change))
        state["code"].copy_(codes)
        if self.freeze is not None:
            self._freeze(layers)

    def _freeze(self, layers: dict[str, Any]) -> None:
        state = self.state
        fresh = (state["frequency"] > self.freeze) & ~state["frozen"]
        # The mean of codes lies between codes, so its rounding needs no clamp.
        aims = torch.where(fresh, state["mean_code"].round().to(state["code"].dtype), state["code"])
        parts = (
            t.split(list(self.sizes.values())) for t in (fresh, state["frozen"], aims, state["code"], state["written"])
        )
        for layer, new, frozen, aim, code, written in zip(layers.values(), *parts, strict=True):
            weight, quant = layer.weight, layer.weight_quant
            moves = type(quant).inverse is not FakeQuant.inverse  # the latent weight depends on the tensor's statistics
            if moves:  # which a frozen weight must not have moved by the optimizer's step
                weight.copy_(torch.where(frozen.view_as(weight), written.view_as(weight), weight))
                new = new & _leaves_room(new | frozen, aim, quant, weight)
            frozen.logical_or_(new)
            code.copy_(torch.where(frozen, aim, code))
            held, u = frozen.view_as(weight), code.view_as(weight).to(weight.dtype)
            for _ in range(PASSES if moves else 1):
                weight.copy_(torch.where(held, quant.inverse(u, weight), weight))
            written.copy_(weight.reshape(-1))

    def share(self) -> dict[str, float]:
        """{layer: share of its weights, in [0, 1], with a frequency above 0.005}; a frozen weight's frequency decays."""
        return self._means("frequency", OSCILLATES)

    def frozen_share(self) -> dict[str, float]:
        """{layer: share of its weights, in [0, 1], that are frozen}."""
        return self._means("frozen", 0)

    def _means(self, what: str, above: float) -> dict[str, float]:
        if not self.state:
            return {}
        parts = self.state[what].split(list(self.sizes.values()))
        shares = torch.stack([(part > above).double().mean() for part in parts])
        return dict(zip(self.sizes, shares.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs. ``freeze`` is an option and not part of it."""
        return {"sizes": dict(self.sizes), "state": dict(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sizes, self.state = dict(state["sizes"]), {name: t.clone() for name, t in state["state"].items()}

    def memory_bytes(self) -> int:
        """Bytes kept during a task; none of them is needed between tasks."""
        return sum(t.numel() * t.element_size() for t in self.state.values())


def _leaves_room(held: Tensor, aim: Tensor, quant: FakeQuant, weight: Tensor) -> Tensor:
    """bool, like ``held`` [weights of a layer]: whether the other weights can still set the mean and the deviation.

    With v the values that hold the codes ``aim`` and w all weights, both less the mean of w, a mean and a deviation at
    which all held codes hold exist if and only if sum v^2 + (sum v)^2 / (number of the rest) < sum w^2, for codes that are
    a function of (w - mean) / std. Both sides are multiples of the variance, so weights that once had room keep it.
    """
    rows = (getattr(quant, "channels", None) or 1, -1)  # what shares its statistics
    part = held.view(rows).float()
    value = quant.inverse(aim.view_as(weight).to(weight.dtype), weight).reshape(rows)
    every = weight.reshape(rows)
    middle = every.mean(1, keepdim=True)
    v = (value - middle) * part
    rest = (1 - part).sum(1).clamp(min=1)
    taken = (v.square().sum(1) + v.sum(1).square() / rest) / (every - middle).square().sum(1)
    room = torch.maximum(taken, part.mean(1)) <= MOST_FROZEN
    return room[:, None].expand_as(part).flatten()


def _quantized(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in weight_layers(model) if isinstance(layer.weight_quant, FakeQuant)}


def _codes(layers: dict[str, Any]) -> Tensor:
    """int16 [weights of all layers], as the quantizer gives them (uniform: int32)."""
    return torch.cat([layer.weight_quant.codes(layer.weight).flatten() for layer in layers.values()])
