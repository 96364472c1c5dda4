"""How quantizers find their first scales in data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RANGES, ROUNDS = 16, 12  # of the search for activations' step and offset


def sample(x: Tensor, size: int = 2**13) -> Tensor:
    """About ``size`` of the values of ``x``, flat, always at the same positions; all values if there are fewer.

    The stride is odd, so that it walks through the channels and positions of a power-of-two shape.
    """
    flat = x.flatten()
    return flat[:: (len(flat) // size) | 1]


def sample_with_extremes(x: Tensor) -> Tensor:
    """``sample``, and the least and the largest value, which it may have missed: at 8 bits clipping them costs more than
    all rounding."""
    return torch.cat([sample(x), x.min().view(1), x.max().view(1)]) if len(x) else x


def high_quantile(x: Tensor) -> Tensor:
    """The 99.9 % quantile of a sample of the positive values, a scalar: 3.3 standard deviations behind a BatchNorm and a
    ReLU. 0 where no value is positive. Of positive ones alone, since most units of a layer may be silent."""
    positive = sample(x[x > 0])
    return positive.quantile(0.999) if len(positive) else x.new_zeros(())


def widened(reach: Tensor, largest: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """``reach`` [C], where values are clipped, or a larger one up to ``largest`` [C] that has a smaller ``error(reach)`` [C].

    Where a paper clips at so many standard deviations, that suits bell-shaped weights of few bits. At 8 bits, and with the
    heavy tails of many a trained network, it loses far more by clipping than it gains in rounding.
    """
    best, least = reach, error(reach)
    for factor in (1.25, 1.6, 2.0, 2.5, 3.2, 4.0):
        wider = torch.minimum(factor * reach, torch.maximum(largest, reach))
        found = error(wider)
        best, least = torch.where(found < least, wider, best), torch.minimum(found, least)
    return best


def least_error(values: Tensor, qn: int, qp: int, offset: bool = False) -> tuple[float, float]:
    """(s, b) with a small mean squared error of s * clamp(round((v - b) / s), qn, qp) + b on ``values`` [N]; b is 0 without
    ``offset``. (0, 0) where all values are 0 or there are none.

    From each of a few ranges: codes for (s, b), then the (s, b) of least squares for these codes, in turns; neither turn
    can increase the error.
    """
    if not len(values):
        return 0.0, 0.0
    values = values.double()
    low = values.min() if offset else values.new_zeros(())
    width = (values - low).abs().max()
    if width == 0:
        return 0.0, low.item()
    v = (values - low) / width  # in [-1, 1], whatever the unit
    s = torch.linspace(1 / RANGES, 1, RANGES, dtype=v.dtype, device=v.device)[:, None] / qp
    b = torch.zeros_like(s)
    for _ in range(ROUNDS):
        q = ((v - b) / s).round().clamp(qn, qp)
        centered = q - q.mean(1, keepdim=True) if offset else q
        spread = centered.square().sum(1, keepdim=True)
        s = torch.where(spread > 0, (centered * v).sum(1, keepdim=True) / spread, s)  # one code alone says nothing of s
        if offset:
            b = (v - s * q).mean(1, keepdim=True)
    error = (s * ((v - b) / s).round().clamp(qn, qp) + b - v).square().mean(1)
    best = error.argmin()
    return (s[best] * width).item(), (b[best] * width + low).item()
