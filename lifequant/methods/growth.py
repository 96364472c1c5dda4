"""Networks that grow between tasks, as a head with more outputs does: what was kept of old entries stays theirs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Size, Tensor

from lifequant.common.errors import UserError
from lifequant.methods.importance import flat


def sized_like(kept: Tensor | None, like: Tensor) -> Tensor:
    """``kept`` itself where it has the shape of ``like``, else a new tensor to be filled."""
    return kept if kept is not None and kept.shape == like.shape else torch.empty_like(like)


def grown(kept: Tensor, fresh: Tensor, name: str) -> Tensor:
    """``fresh`` with ``kept`` in its first entries along every dimension, as rows of a head are appended.

    Raises UserError where ``fresh`` is smaller in a dimension, since nobody knows which entries have gone.
    """
    if kept.dim() != fresh.dim() or any(old > new for old, new in zip(kept.shape, fresh.shape, strict=True)):
        raise UserError(
            f"{name} had the shape {list(kept.shape)} in the former task and now has {list(fresh.shape)}: append new outputs "
            "behind the old ones, and take none away"
        )
    out = fresh.clone()
    out[tuple(slice(size) for size in kept.shape)] = kept
    return out


def grown_flat(kept: Tensor, shapes: Mapping[str, Size], fresh: Mapping[str, Tensor]) -> Tensor:
    """A vector over parameters of ``shapes`` by name, ``kept`` [P], as one over ``fresh``, whose values new entries take.

    A parameter that is no longer there is left out.
    """
    parts = kept.split([shape.numel() for shape in shapes.values()])
    old = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return flat(grown(old[name], value, name) if name in old else value for name, value in fresh.items())


def only_old(values: Tensor, shape: Size | None) -> Tensor:
    """``values`` with 0 outside the first entries of ``shape``; all 0 where there was nothing before (None)."""
    out = torch.zeros_like(values)
    if shape is not None:
        old = tuple(slice(size) for size in shape)
        out[old] = values[old]
    return out
