"""Which integer codes a network uses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lifequant.qat.calibration import hook_activations
from lifequant.qat.modes import eval_mode
from lifequant.qat.weights import weights
from lifequant.quantizers.base import FakeQuant


class CodeCounts(NamedTuple):
    """How often each code of one tensor occurs."""

    quantizer: FakeQuant
    first: int  # the code that counts[0] belongs to
    counts: Tensor  # int64, one entry for each code from ``first`` on


@torch.no_grad()
def code_counts(model: nn.Module, x: Tensor) -> dict[str, CodeCounts]:
    """{quantizer's name: its counts}, for all weights, and for the activations on images ``x`` in eval mode.

    The counts cover the codes qn to qp, and also codes outside this range if a quantizer ``exceeds_bits``.
    """
    found: dict[str, CodeCounts] = {}

    def count(name: str, quant: FakeQuant, value: Tensor) -> None:
        codes = quant.codes(value).long().flatten()
        least, most = (int(bound) for bound in codes.aminmax())
        first, last = min(quant.qn, least), max(quant.qp, most)
        found[name] = CodeCounts(quant, first, torch.bincount(codes - first, minlength=last - first + 1))

    for weight in weights(model):
        if isinstance(weight.quant, FakeQuant):
            count(f"{weight.of}.{weight.quantizer}", weight.quant, weight.tensor)
    with eval_mode(model), hook_activations(model, count):
        model(x)
    return found
