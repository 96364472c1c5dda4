"""Layers that quantize, and what one does to all of them in a network.

Their parameters are named as in torch's own layers, so a float checkpoint loads unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant.quantizers.base import FakeQuant, Quantizer


class QuantConv2d(nn.Conv2d):
    """nn.Conv2d without bias whose weight passes a fake-quantizer."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, padding: int, weight_quant: nn.Module) -> None:
        super().__init__(cin, cout, kernel, stride=stride, padding=padding, bias=False)
        self.weight_quant = weight_quant

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight_quant(self.weight), None)


class QuantLinear(nn.Linear):
    """nn.Linear whose weight and input pass fake-quantizers; the bias stays in float."""

    def __init__(self, cin: int, cout: int, weight_quant: nn.Module, act_quant: nn.Module) -> None:
        super().__init__(cin, cout)
        self.weight_quant, self.act_quant = weight_quant, act_quant

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act_quant(x), self.weight_quant(self.weight), self.bias)


class QuantReLU(nn.Module):
    """ReLU, then the activation quantizer; the quantizer first where it says so."""

    def __init__(self, act_quant: nn.Module) -> None:
        super().__init__()
        self.act_quant = act_quant
        self.before_relu = getattr(act_quant, "before_relu", False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act_quant(x).relu() if self.before_relu else self.act_quant(x.relu())


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

    def _weight(self, cout: int, edge: bool) -> nn.Module:
        return self.weights.weight(self._bits(self.weight_bits, edge), cout if self.per_channel else None)

    def conv(self, cin: int, cout: int, kernel: int, stride: int = 1, edge: bool = False) -> QuantConv2d:
        quant = self._weight(cout, edge)
        return QuantConv2d(cin, cout, kernel, stride, kernel // 2, quant)

    def linear(self, cin: int, cout: int, edge: bool = False) -> QuantLinear:
        weight = self._weight(cout, edge)
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
    for _, layer in weight_layers(model):
        if isinstance(layer.weight_quant, FakeQuant):
            layer.weight_quant.calibrate(layer.weight)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    model.train()
    with watching_activations(model, lambda name, quant, value: quant.calibrate(value)):
        model(x)
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked"):
            buffer.copy_(kept[name])
    model.train(training)
