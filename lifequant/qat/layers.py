"""Quantized layers, and functions over all of them in a network.

Their parameters are named as in torch's own layers, so a float checkpoint loads unchanged. A network of our own asks a
Scheme for them; in any other network, convert.py converts torch's layers.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lifequant.common.errors import UserError, closest
from lifequant.qat.growing import grow
from lifequant.quantizers.base import BIT_WIDTHS, FakeQuant, Quantizer


class _OwnWeight(nn.Module):
    """A layer whose weight may be set to one with more outputs, and then its quantizer grows (qat/growing.py).

    torch's ``fuse_conv_bn_eval`` and ``fuse_linear_bn_eval`` must not fold it: they set its weight.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and sys._getframe(1).f_globals.get("__name__") == "torch.nn.utils.fusion":
            raise UserError(
                f"torch's folding of BatchNorm changes the codes of a {type(self).__name__}: use lifequant.fold_batchnorm(q)"
            )
        if name == "weight" and isinstance(value, Tensor):
            grow(getattr(self, "weight_quant", None), value)
        super().__setattr__(name, value)


class QuantConv2d(_OwnWeight, nn.Conv2d):
    """nn.Conv2d whose weight passes a fake-quantizer, and so does its input where it has an ``act_quant``.

    The constructor makes no bias; a converted layer keeps its bias in float.
    """

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, padding: int, weight_quant: nn.Module) -> None:
        super().__init__(cin, cout, kernel, stride=stride, padding=padding, bias=False)
        self.weight_quant, self.act_quant = weight_quant, None

    @classmethod
    def convert_(cls, conv: nn.Conv2d, weight_quant: nn.Module) -> None:
        """Make a QuantConv2d of ``conv``, in place: parameters, hooks, device, and whoever refers to it stay."""
        conv.__class__ = cls
        conv.weight_quant, conv.act_quant = weight_quant, None

    def forward(self, input: Tensor) -> Tensor:  # torch's name, since some call their layers by it
        if self.act_quant is not None:
            input = self.act_quant(input)
        return self._conv_forward(input, self.weight_quant(self.weight), self.bias)


class QuantConvTranspose2d(_OwnWeight, nn.ConvTranspose2d):
    """nn.ConvTranspose2d whose weight passes a fake-quantizer, and so does its input where it has an ``act_quant``.

    The weight is [in, out / groups, height, width]: its quantizer has one scale, for the first dimension is not the output's.
    """

    @classmethod
    def convert_(cls, conv: nn.ConvTranspose2d, weight_quant: nn.Module) -> None:
        """Make a QuantConvTranspose2d of ``conv``, in place."""
        conv.__class__ = cls
        conv.weight_quant, conv.act_quant = weight_quant, None

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.act_quant is not None:
            input = self.act_quant(input)
        added = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        weight = self.weight_quant(self.weight)
        return F.conv_transpose2d(
            input, weight, self.bias, self.stride, self.padding, added, self.groups, self.dilation
        )


class QuantLinear(_OwnWeight, nn.Linear):
    """nn.Linear whose weight and input pass fake-quantizers; the bias stays in float."""

    float_input = False  # turned from torch's: qat/layer_inputs.py decides on its input

    def __init__(self, cin: int, cout: int, weight_quant: nn.Module, act_quant: nn.Module) -> None:
        super().__init__(cin, cout)
        self.weight_quant, self.act_quant = weight_quant, act_quant

    @classmethod
    def convert_(cls, linear: nn.Linear, weight_quant: nn.Module) -> None:
        """Make a QuantLinear of ``linear``, in place, that leaves its input as it is."""
        linear.__class__ = cls
        linear.weight_quant, linear.act_quant, linear.float_input = weight_quant, nn.Identity(), True

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.act_quant(input), self.weight_quant(self.weight), self.bias)


class QuantReLU(nn.Module):
    """ReLU (or ReLU6), then the activation quantizer. A quantizer with ``before_relu`` comes first."""

    inplace = False
    bound: float | None = None

    def __init__(self, act_quant: nn.Module) -> None:
        super().__init__()
        self.act_quant = act_quant

    @classmethod
    def convert_(cls, relu: nn.ReLU | nn.ReLU6, act_quant: nn.Module) -> None:
        """Make a QuantReLU of ``relu``, in place; its own ``inplace`` holds on, for some networks go on with the input."""
        bound = 6.0 if isinstance(relu, nn.ReLU6) else None
        relu.__class__ = cls
        relu.act_quant, relu.bound = act_quant, bound

    def rectify(self, x: Tensor, inplace: bool) -> Tensor:
        return F.relu(x, inplace) if self.bound is None else F.hardtanh(x, 0.0, self.bound, inplace)

    def forward(self, input: Tensor) -> Tensor:
        if getattr(self.act_quant, "before_relu", False):
            return self.rectify(self.act_quant(input), False)
        return self.act_quant(self.rectify(input, self.inplace))

    def extra_repr(self) -> str:
        return "" if self.bound is None else f"bound={self.bound:g}"


@dataclass(frozen=True)
class Scheme:
    """How a network is quantized; a model asks it for its layers. ``edge`` is the first or the last layer.

    At 32 bits a tensor is float everywhere; below, the first and last layers have ``first_last_bits``.
    """

    weights: Quantizer
    activations: Quantizer
    weight_bits: int = 4
    act_bits: int = 4
    first_last_bits: int = 8
    per_channel: bool = False  # one weight step for each output channel

    def _bits(self, bits: int, edge: bool) -> int:
        return self.first_last_bits if edge and bits != 32 else bits

    def weight(self, cout: int, edge: bool = False, bits: int | None = None) -> nn.Module:
        """A weight's quantizer, for ``cout`` output channels."""
        bits = self._bits(self.weight_bits, edge) if bits is None else bits
        return self.weights.weight(bits, cout if self.per_channel else None)

    def weight_of(self, layer: nn.Module, edge: bool = False, bits: int | None = None) -> nn.Module:
        """The quantizer of a layer's weight. That of nn.ConvTranspose2d has one scale, also where ``per_channel`` is set."""
        if isinstance(layer, nn.ConvTranspose2d):
            return replace(self, per_channel=False).weight(0, edge, bits)
        return self.weight(layer.weight.shape[0], edge, bits)

    def conv(self, cin: int, cout: int, kernel: int, stride: int = 1, edge: bool = False) -> QuantConv2d:
        quant = self.weight(cout, edge)
        return QuantConv2d(cin, cout, kernel, stride, kernel // 2, quant)

    def linear(self, cin: int, cout: int, edge: bool = False) -> QuantLinear:
        weight = self.weight(cout, edge)
        return QuantLinear(cin, cout, weight, self.activations.activation(self._bits(self.act_bits, edge)))

    def relu(self) -> QuantReLU:
        return QuantReLU(self.activations.activation(self.act_bits))


Weighted = QuantConv2d | QuantConvTranspose2d | QuantLinear
TORCH_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def to_torch_layers(model: nn.Module) -> None:
    """Make torch's own layers of quantized layers, in place; their quantizers go, which at 32 bits do nothing."""
    for module in model.modules():
        if isinstance(module, Weighted | QuantReLU):
            for quantizer in ("weight_quant", "act_quant"):
                module._modules.pop(quantizer, None)
            inplace, bound = getattr(module, "inplace", False), getattr(module, "bound", None)
            if isinstance(module, QuantReLU):
                module.inplace = inplace
                module.__class__ = nn.ReLU if bound is None else nn.ReLU6
                if bound is not None:
                    module.min_val, module.max_val = 0.0, bound
            else:
                module.__class__ = next(kind for kind in TORCH_LAYERS if isinstance(module, kind))
                module.__dict__.pop("float_input", None)


def weight_layers(model: nn.Module) -> Iterator[tuple[str, Weighted]]:
    """(name, layer) of every layer that has a weight quantizer (nn.Identity at 32 bits included)."""
    for name, module in model.named_modules():
        if isinstance(module, Weighted):
            yield name, module


def fake_quants(model: nn.Module) -> Iterator[tuple[str, FakeQuant]]:
    """(name, module) of every fake-quantizer."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuant):
            yield name, module


def set_layer_bits(
    model: nn.Module,
    scheme: Scheme,
    bits: Mapping[str, int | tuple[int, int]],
    float_weights: Container[str] = (),
) -> None:
    """Give the layers that a pattern names quantizers of other bit-widths, in place; their steps must be set anew.

    ``bits`` is {pattern: bits, or (weight bits, activation bits)}; a pattern is a shell pattern of a layer's name, or of
    a block's, and then means all below it: ``layer3``, ``layer3.*``, ``*.conv1``. Of two that fit, the later holds.
    Activations have their bits at a QuantReLU, or where a QuantLinear quantizes its input. Layers of ``float_weights`` keep
    theirs in float. Raises UserError for a pattern that fits no layer and for bits that aren't offered.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Weighted | QuantReLU)}
    for pattern, value in bits.items():
        widths = tuple(value) if isinstance(value, tuple | list) else (value, value)
        if len(widths) != 2:
            raise UserError(f"layer_bits, {pattern!r}: {value} is neither bits nor (weight bits, activation bits)")
        for width in widths:
            check_bits(width, f"layer_bits, {pattern!r}")
        fitting = [n for n in layers if _fits(n, pattern)]
        if not fitting:
            blocks = {name.rsplit(".", cut)[0] for name in layers for cut in range(name.count(".") + 1)}
            near = closest(pattern.removesuffix(".*"), blocks) or f" (there are {', '.join(sorted(blocks)[:5])}, ...)"
            raise UserError(f"layer_bits: no quantized layer's name fits {pattern!r}{near}")
        for name in fitting:
            if name not in float_weights:
                _set_bits(layers[name], scheme, *widths)
    device = next((p.device for p in model.parameters()), None)
    for _, quant in fake_quants(model):
        quant.to(device)


def bits_by_name(name: str, bits: Mapping[str, int | tuple[int, int]], default: tuple[int, int]) -> tuple[int, int]:
    """(weight bits, activation bits) of the layer ``name``; ``bits`` is as ``set_layer_bits`` takes it."""
    for pattern, value in bits.items():
        if _fits(name, pattern):
            default = tuple(value) if isinstance(value, tuple | list) else (value, value)
    return default


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _set_bits(layer: nn.Module, scheme: Scheme, weight_bits: int, act_bits: int) -> None:
    if isinstance(layer, Weighted):
        layer.weight_quant = scheme.weight_of(layer, bits=weight_bits)
    if isinstance(layer, QuantReLU) or (isinstance(layer, QuantLinear) and not layer.float_input):
        layer.act_quant = scheme.activations.activation(act_bits)


def check_bits(bits: int, what: str) -> None:
    """Raises UserError for a bit-width that isn't offered; ``what`` begins its message."""
    if bits not in BIT_WIDTHS:
        raise UserError(f"{what}: {bits!r} bits are not offered (known: {', '.join(map(str, BIT_WIDTHS))})")


@contextmanager
def no_rounding(model: nn.Module) -> Iterator[None]:
    """Inside, every quantizer skips clamp and round; ProxQ's projection stays."""
    quants = [quant for _, quant in fake_quants(model)]
    try:
        for quant in quants:
            quant.rounding = False
        yield
    finally:
        for quant in quants:
            quant.rounding = True
