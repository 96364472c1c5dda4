"""Layers that quantize, and what one does to all of them in a network.

Their parameters are named as in torch's own layers, so a float checkpoint loads unchanged. A network of our own asks a
Scheme for them; in any other, convert.py turns torch's layers into them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant.common.errors import UserError, closest
from lifequant.quantizers.base import BIT_WIDTHS, FakeQuant, Quantizer


def quantized(x: Tensor, quant: nn.Module) -> Tensor:
    """``quant(x)``, in float32 where x is bfloat16: dividing in bfloat16 changes 3 % of 4-bit codes and 23 % of 8-bit ones.

    Under autocast the layer behind casts the quantized values back.
    """
    return quant(x.float() if x.dtype == torch.bfloat16 and isinstance(quant, FakeQuant) else x)


class QuantConv2d(nn.Conv2d):
    """nn.Conv2d whose weight passes a fake-quantizer; a bias stays in float. Made here it has none."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, padding: int, weight_quant: nn.Module) -> None:
        super().__init__(cin, cout, kernel, stride=stride, padding=padding, bias=False)
        self.weight_quant = weight_quant

    @classmethod
    def turn(cls, conv: nn.Conv2d, weight_quant: nn.Module) -> None:
        """Make a QuantConv2d of ``conv``, in place: parameters, hooks, device, and whoever refers to it stay."""
        conv.__class__ = cls
        conv.weight_quant = weight_quant

    def forward(self, input: Tensor) -> Tensor:  # torch's name, since some call their layers by it
        return self._conv_forward(input, self.weight_quant(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """nn.Linear whose weight and input pass fake-quantizers; the bias stays in float."""

    float_input = False  # turned from torch's: its input may be signed, which no activation quantizer takes

    def __init__(self, cin: int, cout: int, weight_quant: nn.Module, act_quant: nn.Module) -> None:
        super().__init__(cin, cout)
        self.weight_quant, self.act_quant = weight_quant, act_quant

    @classmethod
    def turn(cls, linear: nn.Linear, weight_quant: nn.Module) -> None:
        """Make a QuantLinear of ``linear``, in place, that leaves its input as it is."""
        linear.__class__ = cls
        linear.weight_quant, linear.act_quant, linear.float_input = weight_quant, nn.Identity(), True

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(quantized(input, self.act_quant), self.weight_quant(self.weight), self.bias)


class QuantReLU(nn.Module):
    """ReLU (or ReLU6), then the activation quantizer; the quantizer first where it says so."""

    inplace = False
    bound: float | None = None

    def __init__(self, act_quant: nn.Module) -> None:
        super().__init__()
        self.act_quant = act_quant

    @classmethod
    def turn(cls, relu: nn.ReLU | nn.ReLU6, act_quant: nn.Module) -> None:
        """Make a QuantReLU of ``relu``, in place; its own ``inplace`` holds on, for some networks go on with the input."""
        bound = 6.0 if isinstance(relu, nn.ReLU6) else None
        relu.__class__ = cls
        relu.act_quant, relu.bound = act_quant, bound

    def rectify(self, x: Tensor, inplace: bool) -> Tensor:
        return F.relu(x, inplace) if self.bound is None else F.hardtanh(x, 0.0, self.bound, inplace)

    def forward(self, input: Tensor) -> Tensor:
        if getattr(self.act_quant, "before_relu", False):
            return self.rectify(quantized(input, self.act_quant), False)
        return quantized(self.rectify(input, self.inplace), self.act_quant)

    def extra_repr(self) -> str:
        return "" if self.bound is None else f"bound={self.bound:g}"


@dataclass(frozen=True)
class Scheme:
    """How a network is quantized; a model asks it for its layers. ``edge`` is the first or the last layer.

    At 32 bits a tensor is float everywhere; below, the first and last layers have ``edge_bits``.
    """

    weights: Quantizer
    activations: Quantizer
    weight_bits: int = 4
    act_bits: int = 4
    edge_bits: int = 8
    per_channel: bool = False  # one weight step for each output channel

    def _bits(self, bits: int, edge: bool) -> int:
        return self.edge_bits if edge and bits != 32 else bits

    def weight(self, cout: int, edge: bool = False, bits: int | None = None) -> nn.Module:
        """A weight's quantizer, for ``cout`` output channels."""
        bits = self._bits(self.weight_bits, edge) if bits is None else bits
        return self.weights.weight(bits, cout if self.per_channel else None)

    def conv(self, cin: int, cout: int, kernel: int, stride: int = 1, edge: bool = False) -> QuantConv2d:
        quant = self.weight(cout, edge)
        return QuantConv2d(cin, cout, kernel, stride, kernel // 2, quant)

    def linear(self, cin: int, cout: int, edge: bool = False) -> QuantLinear:
        weight = self.weight(cout, edge)
        return QuantLinear(cin, cout, weight, self.activations.activation(self._bits(self.act_bits, edge)))

    def relu(self) -> QuantReLU:
        return QuantReLU(self.activations.activation(self.act_bits))


def weight_layers(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """(name, layer) of every layer that has a weight quantizer (nn.Identity at 32 bits included)."""
    for name, module in model.named_modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            yield name, module


def fake_quants(model: nn.Module) -> Iterator[tuple[str, FakeQuant]]:
    """(name, module) of every fake-quantizer."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuant):
            yield name, module


def set_layer_bits(model: nn.Module, scheme: Scheme, bits: Mapping[str, int | tuple[int, int]]) -> None:
    """Give the layers that a pattern names quantizers of other bit-widths, in place; their steps must be set anew.

    ``bits`` is {pattern: bits, or (weight bits, activation bits)}; a pattern is a shell pattern of a layer's name, or of
    a block's, and then means all below it: ``layer3``, ``layer3.*``, ``*.conv1``. Of two that fit, the later holds.
    Activations have their bits at a QuantReLU, or where a QuantLinear quantizes its input. Raises UserError for a
    pattern that fits no layer and for bits that aren't offered.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantConv2d | QuantLinear | QuantReLU)}
    for pattern, value in bits.items():
        widths = tuple(value) if isinstance(value, tuple | list) else (value, value)
        if len(widths) != 2:
            raise UserError(f"layer_bits, {pattern!r}: {value} is neither bits nor (weight bits, activation bits)")
        for width in widths:
            check_bits(width, f"layer_bits, {pattern!r}")
        fitting = [m for n, m in layers.items() if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]
        if not fitting:
            blocks = {name.rsplit(".", cut)[0] for name in layers for cut in range(name.count(".") + 1)}
            raise UserError(
                f"layer_bits: no quantized layer's name fits {pattern!r}{closest(pattern.removesuffix('.*'), blocks)}"
            )
        for layer in fitting:
            _set_bits(layer, scheme, *widths)
    device = next((p.device for p in model.parameters()), None)
    for _, quant in fake_quants(model):
        quant.to(device)


def _set_bits(layer: nn.Module, scheme: Scheme, weight_bits: int, act_bits: int) -> None:
    if not isinstance(layer, QuantReLU):
        layer.weight_quant = scheme.weight(layer.weight.shape[0], bits=weight_bits)
    if isinstance(layer, QuantReLU) or (isinstance(layer, QuantLinear) and not layer.float_input):
        layer.act_quant = scheme.activations.activation(act_bits)


def check_bits(bits: int, what: str) -> None:
    """Raises UserError for a bit-width that isn't offered; ``what`` begins its message."""
    if bits not in BIT_WIDTHS:
        raise UserError(f"{what}: {bits!r} bits are not offered (known: {', '.join(map(str, BIT_WIDTHS))})")


def packed_bytes(layer: QuantConv2d | QuantLinear) -> int:
    """Bytes of the layer's weights at their bit-width, or at that which their codes need, the steps (float32) included."""
    quant = layer.weight_quant
    if not isinstance(quant, FakeQuant):
        return 4 * layer.weight.numel()
    bits = quant.bits
    if quant.exceeds_bits:
        codes = quant.codes(layer.weight)
        bits = int(codes.max() - codes.min()).bit_length()
    return -(-layer.weight.numel() * bits // 8) + 4 * quant.step().numel()


@torch.no_grad()
def quantized_weights(model: nn.Module) -> dict[str, Tensor]:
    """{layer: the weights that the network computes with}, float32."""
    return {name: layer.weight_quant(layer.weight).detach().clone() for name, layer in weight_layers(model)}


@contextmanager
def no_rounding(model: nn.Module) -> Iterator[None]:
    """Inside, every quantizer skips clamp and round; a projection stays."""
    quants = [quant for _, quant in fake_quants(model)]
    try:
        for quant in quants:
            quant.rounding = False
        yield
    finally:
        for quant in quants:
            quant.rounding = True


@contextmanager
def watching_activations(model: nn.Module, watch) -> Iterator[None]:
    """Inside, ``watch(name, quantizer, input)`` runs before every activation quantizer's forward."""
    handles = []
    for name, quant in fake_quants(model):
        if not name.endswith("weight_quant"):
            handles.append(
                quant.register_forward_pre_hook(lambda module, args, name=name: watch(name, module, args[0]))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Set every step from the weights and one batch ``x``, layer after layer; BatchNorm uses the batch, keeps its state."""
    calibrate_weights(model)
    with trial(model), watching_activations(model, lambda name, quant, value: calibrate_one(quant, value)):
        model(x)


@torch.no_grad()
def calibrate_weights(model: nn.Module) -> None:
    """Set the steps of all weights."""
    for _, layer in weight_layers(model):
        if isinstance(layer.weight_quant, FakeQuant):
            calibrate_one(layer.weight_quant, layer.weight)


def calibrate_one(quant: FakeQuant, x: Tensor) -> None:
    """Set one quantizer's step from ``x`` and note that it has been set."""
    quant.calibrate(x)
    quant.calibrated = True


@contextmanager
def trial(model: nn.Module, train: bool = True) -> Iterator[None]:
    """Inside, the model is in train mode (or as it is) without dropout; afterwards modes and buffers are as before.

    A model in train mode keeps the mode of each of its modules, so that a frozen BatchNorm is one here, too. The buffers
    of quantizers alone stay as they are then, for a calibration sets them.
    """
    modes = [(module, module.training) for module in model.modules()]
    own = {id(buffer) for _, quant in fake_quants(model) for buffer in quant.buffers()}
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if id(buffer) not in own}
    if train and not model.training:
        model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept:
                    buffer.copy_(kept[name])
        for module, training in modes:
            module.training = training
