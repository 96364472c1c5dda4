"""Which integer codes a network really uses, and how many bytes it takes at its bit-widths."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifequant.qat.calibration import watching_activations
from lifequant.qat.layers import weight_layers
from lifequant.quantizers.base import FakeQuant


def code_counts(model: nn.Module, x: Tensor) -> dict[str, tuple[FakeQuant, int, Tensor]]:
    """{tensor: (its quantizer, the first code, how often each code from that one on occurs)}, int64, weights and
    activations (on images x). The codes are qn to qp, and those beyond that are used (``exceeds_bits``)."""
    counts: dict[str, tuple[FakeQuant, int, Tensor]] = {}

    def count(name: str, quant: FakeQuant, value: Tensor) -> None:
        codes, times = quant.codes(value).long().unique(return_counts=True)
        first, last = min(quant.qn, int(codes[0])), max(quant.qp, int(codes[-1]))
        dense = torch.zeros(last - first + 1, dtype=torch.int64, device=value.device)
        dense[codes - first] = times
        counts[name] = quant, first, dense

    for name, layer in weight_layers(model):
        if isinstance(layer.weight_quant, FakeQuant):
            count(f"{name}.weight_quant", layer.weight_quant, layer.weight)
    training = model.training
    model.eval()
    with torch.no_grad(), watching_activations(model, count):
        model(x)
    model.train(training)
    return counts
