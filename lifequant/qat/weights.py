"""All weights of a network that pass a quantizer: those of its layers, and attention's projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifequant.qat.attention import PROJECTIONS, QuantMultiheadAttention
from lifequant.qat.layers import QuantLinear, Weighted


class Weight(NamedTuple):
    """A weight and its quantizer (nn.Identity at 32 bits), by their names in their module."""

    of: str  # the module's name
    module: nn.Module
    parameter: str
    quantizer: str

    @property
    def name(self) -> str:
        """The layer's name; of a projection the parameter's."""
        return self.of if self.parameter == "weight" else f"{self.of}.{self.parameter}"

    @property
    def tensor(self) -> Tensor:
        """The weight, not quantized."""
        return getattr(self.module, self.parameter)

    @property
    def quant(self) -> nn.Module:
        return getattr(self.module, self.quantizer)

    def quantized(self) -> Tensor:
        """The weight that the network computes with."""
        return self.quant(self.tensor)


def weights(model: nn.Module) -> Iterator[Weight]:
    """All of them, in the order of ``named_modules``."""
    for name, module in model.named_modules():
        if isinstance(module, Weighted):
            yield Weight(name, module, "weight", "weight_quant")
        elif isinstance(module, QuantMultiheadAttention):
            for parameter, quantizer in PROJECTIONS.items():
                if getattr(module, parameter) is not None:
                    yield Weight(name, module, parameter, quantizer)


def body_weights(model: nn.Module) -> list[Weight]:
    """All but those of the head, the last QuantLinear."""
    found = list(weights(model))
    head = next((w.module for w in reversed(found) if isinstance(w.module, QuantLinear)), None)
    return [w for w in found if w.module is not head]


@torch.no_grad()
def quantized_weights(model: nn.Module) -> dict[str, Tensor]:
    """{name: the weights that the network computes with}, float32."""
    return {w.name: w.quantized().detach().clone() for w in weights(model)}
