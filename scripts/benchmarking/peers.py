"""The benchmark's network with other libraries' quantized layers: 4 bits, 8 in the first and last layer, as ours.

A model's builder asks a scheme for its layers (lifequant.quantizers.layers.Scheme); these schemes answer with others'.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

EDGE_BITS = 8
MISSING = {"brevitas": "pip install brevitas"}  # row: what installs its package


def missing(row: str) -> str | None:
    """Why the row can't be had here, None where it can."""
    package = row.split("_compiled")[0]
    if package in MISSING and importlib.util.find_spec(package) is None:
        return f"{package} is not installed: {MISSING[package]}"
    if package == "torch_qat" and importlib.util.find_spec("torch.ao.nn.qat") is None:
        return f"torch {torch.__version__} has no torch.ao.nn.qat any more"
    return None


def scheme(row: str, bits: int = 4) -> Any:
    return BrevitasScheme(bits) if row.startswith("brevitas") else TorchScheme(bits)


class BrevitasScheme:
    """Brevitas's own defaults: weight scales from the largest value at every step, activation scales learned."""

    def __init__(self, bits: int) -> None:
        import brevitas.nn
        from brevitas.quant import Uint8ActPerTensorFloat

        self.nn, self.input, self.bits = brevitas.nn, Uint8ActPerTensorFloat, bits

    def conv(self, cin: int, cout: int, kernel: int, stride: int = 1, edge: bool = False) -> nn.Module:
        bits = EDGE_BITS if edge else self.bits
        return self.nn.QuantConv2d(
            cin, cout, kernel, stride=stride, padding=kernel // 2, bias=False, weight_bit_width=bits
        )

    def linear(self, cin: int, cout: int, edge: bool = False) -> nn.Module:
        bits = EDGE_BITS if edge else self.bits
        return self.nn.QuantLinear(
            cin, cout, bias=True, weight_bit_width=bits, input_quant=self.input, input_bit_width=bits
        )

    def relu(self) -> nn.Module:
        return self.nn.QuantReLU(bit_width=self.bits)


class TorchScheme:
    """torch.ao.quantization's FakeQuantize: scales from moving averages of the range, nothing learned.

    The layers are those that prepare_qat puts in (torch.ao.nn.qat); BatchNorm is not folded, as it isn't with us.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    @staticmethod
    def fake_quant(least: int, most: int) -> Any:
        from torch.ao import quantization

        symmetric = least < 0
        return quantization.FakeQuantize.with_args(
            observer=quantization.MovingAverageMinMaxObserver,
            quant_min=least,
            quant_max=most,
            dtype=torch.qint8 if symmetric else torch.quint8,
            qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        )

    def config(self, bits: int) -> Any:
        from torch.ao.quantization import QConfig

        return QConfig(activation=nn.Identity, weight=self.fake_quant(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))

    def conv(self, cin: int, cout: int, kernel: int, stride: int = 1, edge: bool = False) -> nn.Module:
        from torch.ao.nn import qat

        config = self.config(EDGE_BITS if edge else self.bits)
        return qat.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False, qconfig=config)

    def linear(self, cin: int, cout: int, edge: bool = False) -> nn.Module:
        from torch.ao.nn import qat

        bits = EDGE_BITS if edge else self.bits
        return nn.Sequential(self.fake_quant(0, 2**bits - 1)(), qat.Linear(cin, cout, qconfig=self.config(bits)))

    def relu(self) -> nn.Module:
        return nn.Sequential(nn.ReLU(), self.fake_quant(0, 2**self.bits - 1)())
