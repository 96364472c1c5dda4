"""``--importance_bits``: importances and anchors as they come back from fewer bits.

They are rounded where they are kept, and stay float32 tensors, so that a step costs what it did. Each tensor (a parameter) has a
scale of its own, its largest magnitude, in 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SCALE_BYTES = 4


def rounded(values: Tensor, bits: int, unsigned: bool = False) -> Tensor:
    """One tensor from ``bits`` bits a value: 32 as it is, 16 as float16 of the share of the largest magnitude, 8 as a code.

    Codes are 255 levels around zero; ``unsigned`` (importances): 256 levels of the square root, since importances span many
    magnitudes, and evenly spaced levels would make zeros of most.
    """
    if bits == 32 or not values.numel():
        return values
    scale = values.abs().max().clamp(min=torch.finfo(values.dtype).tiny)
    share = values / scale
    if bits == 16:
        return share.half().to(values.dtype) * scale
    if unsigned:
        return (share.clamp(min=0).sqrt() * 255).round().div(255).square() * scale
    return (share * 127).round().div(127) * scale


def rounded_flat(values: Tensor, sizes: Sequence[int], bits: int, unsigned: bool = False) -> Tensor:
    """``rounded`` of each of the tensors with that many values which lie behind one another in ``values`` [P]."""
    return torch.cat([rounded(part, bits, unsigned) for part in values.split(list(sizes))])


def nbytes(values: int, tensors: int, bits: int) -> int:
    """Bytes of that many values in that many tensors."""
    return values * bits // 8 + (tensors * SCALE_BYTES if bits < 32 else 0)
