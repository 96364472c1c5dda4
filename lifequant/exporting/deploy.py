"""A copy of a quantized network in which every quantizer is a placeholder that torch.onnx takes into the graph as it is.

Placeholders are operators of the domain ``lifequant``; graph.py, fast.py and exact.py move them, lower.py replaces them:

    Quantize(x)     uint8: clamp(round((x - offset) / scale), low, high) + zero
    Levels(x)       uint8: table[number of thresholds below x]
    Dequantize(k)   scale * (k - zero) + offset
    Weight(k, s)    s * k, the scale s one number or one for each output channel; k int8
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifequant.common.errors import UserError
from lifequant.data.augment import Statistics
from lifequant.exporting import integers
from lifequant.exporting.integers import Levels, Steps, WeightCodes
from lifequant.qat.attention import PROJECTIONS, QuantMultiheadAttention
from lifequant.qat.copying import copied
from lifequant.qat.folding import fold_batchnorm, foldable
from lifequant.qat.layer_inputs import OpenInput
from lifequant.qat.layers import fake_quants
from lifequant.quantizers.base import FakeQuant

DOMAIN = "lifequant"
Notes = dict[str, list[str]]  # {text: quantizers}


def placeholder(name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, **attributes: object) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attrs=attributes, dtype=dtype, shape=inputs[0].shape, version=1
    )


class StoredWeight(nn.Module):
    """Gives a constant weight, whatever the latent one is."""

    def __init__(self, found: WeightCodes) -> None:
        super().__init__()
        self.register_buffer("codes", found.codes.to(torch.int8).contiguous())
        self.register_buffer("scale", found.scale)

    def forward(self, latent: Tensor) -> Tensor:
        return placeholder("Weight", (self.codes, self.scale), torch.float32)


class FloatWeight(nn.Module):
    """The same in float, where no int8 codes give these values."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.detach().float().contiguous())

    def forward(self, latent: Tensor) -> Tensor:
        return self.values


class StoredSteps(nn.Module):
    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        s = self.steps
        at = {"scale": s.scale, "offset": s.offset, "zero": 128 if s.low < 0 else 0}
        codes = placeholder("Quantize", (x,), torch.uint8, low=s.low, high=s.high, **at)
        return placeholder("Dequantize", (codes,), torch.float32, **at)


class StoredLevels(nn.Module):
    """``table`` uint8 [levels]; without a scale it counts levels, and ``values`` has what they stand for."""

    def __init__(self, levels: Levels, table: Tensor, scale: float | None, zero: int = 0) -> None:
        super().__init__()
        self.thresholds, self.table, self.scale, self.zero = levels.thresholds.tolist(), table.tolist(), scale, zero
        self.register_buffer("values", levels.values.float())

    def forward(self, x: Tensor) -> Tensor:
        codes = placeholder("Levels", (x,), torch.uint8, thresholds=self.thresholds, table=self.table)
        if self.scale is None:
            return self.values[codes.long()]
        return placeholder("Dequantize", (codes,), torch.float32, scale=self.scale, zero=self.zero, offset=0.0)


class FromBytes(nn.Module):
    """images: uint8 [n, 3, H, W] -> what the network gives for them, normalized as in training (data/augment.py)."""

    def __init__(self, model: nn.Module, fast: bool, statistics: Statistics) -> None:
        super().__init__()
        self.model, self.fast = model, fast
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in statistics)
        for name, value in (("mean", mean), ("std", std), ("factor", 1 / (255 * std)), ("shift", mean / std)):
            self.register_buffer(name, value.float())

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        return self.model(images * self.factor - self.shift if self.fast else (images / 255 - self.mean) / self.std)


def deployed(q: nn.Module, fast: bool) -> tuple[nn.Module, list[str]]:
    """(a copy of ``q`` on the CPU in eval mode with placeholders and without BatchNorm where it can be folded, notes).

    A note says what could not become integers as it is, and where. Raises UserError for scales that are not set.
    """
    for name, quant in fake_quants(q):
        if quant.state_dict() and not quant.calibrated:
            raise UserError(f"export: the scale of {name} is not set: calibrate or train the model before")
    q = copied(q, "export").cpu().eval()
    pairs = foldable(q)
    q = fold_batchnorm(q, pairs) if pairs else q
    notes: Notes = {}
    replaced: dict[int, nn.Module] = {}  # layers may share a quantizer
    for name, module in list(q.named_modules()):
        if isinstance(module, FakeQuant | OpenInput):
            continue
        if isinstance(module, QuantMultiheadAttention):
            weights = {quant: getattr(module, weight) for weight, quant in PROJECTIONS.items()}
        else:
            weights = {"weight_quant": getattr(module, "weight", None)}
        for attribute, quant in list(module.named_children()):
            if isinstance(quant, OpenInput):
                quant = nn.Identity() if bool(quant.skips) else quant.quant
                setattr(module, attribute, quant)
            if not isinstance(quant, FakeQuant):
                continue
            if id(quant) not in replaced:
                where = f"{name}.{attribute}".lstrip(".")
                weight = weights.get(attribute)
                made = (
                    _activation(quant, where, fast, notes)
                    if weight is None
                    else _weight(quant, weight, where, fast, notes)
                )
                replaced[id(quant)] = made
            setattr(module, attribute, replaced[id(quant)])
    return q, [f"{_named(where)}: {text}" for text, where in notes.items()]


def _weight(quant: FakeQuant, weight: Tensor, where: str, fast: bool, notes: Notes) -> nn.Module:
    found = integers.weight_codes(quant, weight)
    if found is not None and found.fits(-128, 127):
        return StoredWeight(found)
    values, levels = quant(weight), len(quant.codes(weight).unique())
    if fast:
        _note(notes, where, f"{levels} values of a weight are rounded to int8 codes, with a scale for each channel")
        return StoredWeight(integers.rounded_to_8_bits(values))
    _note(notes, where, f"no int8 codes give the {levels} values of a weight, so the layer computes in float with them")
    return FloatWeight(values)


def _activation(quant: FakeQuant, where: str, fast: bool, notes: Notes) -> nn.Module:
    found = integers.activation_levels(quant)
    if isinstance(found, Steps):
        if not found.offset or not fast:
            return StoredSteps(found)
        found = integers.as_levels(found)
    if (exact := integers.integer_levels(found)) is not None:
        return StoredLevels(found, *exact)
    levels = len(found.values)
    if fast:
        _note(notes, where, f"{levels} values of an input are rounded to multiples of one step, 8 bits of them")
        return StoredLevels(found, *integers.on_grid(found))
    _note(notes, where, f"8 bits do not hold the {levels} values of an input, so the layer computes in float with them")
    return StoredLevels(found, torch.arange(levels, dtype=torch.uint8), None)


def _note(notes: Notes, where: str, text: str) -> None:
    notes.setdefault(text, []).append(where)


def _named(where: list[str]) -> str:
    return ", ".join(where) if len(where) <= 3 else f"{where[0]} and {len(where) - 1} more"
