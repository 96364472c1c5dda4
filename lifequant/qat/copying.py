"""Copy a model, also one that keeps tensors of its last forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lifequant.common.errors import UserError


def copied(model: nn.Module, who: str, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """``copy.deepcopy(model, memo)``; the copy has values without a graph in place of tensors that a forward pass left.

    Such are features, attention maps and the weight of ``torch.nn.utils.weight_norm``, which torch refuses to copy. Raises
    UserError, which begins with ``who``, where something else can't be copied (a lock, an open file) and for lazy layers.
    """
    for name, module in model.named_modules():
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
            raise UserError(
                f"{who}: {_named(name, module)} has no shape yet, as it is lazy: run the model once on a batch before"
            )
    memo = dict(memo or {})
    alive = []  # ids in the memo must not be those of tensors that are gone
    for module in model.modules():
        for t in _tensors(module.__dict__):
            if t.grad_fn is not None and id(t) not in memo:
                memo[id(t)] = t.detach().clone()
                alive.append(t)
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:
        raise UserError(f"{who}: the model can't be copied{_culprit(model, memo)}: {_first_line(error)}") from error


def _tensors(found: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in an object's attributes, and in the containers among these."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict | list | tuple) and depth:
        for value in found.values() if isinstance(found, dict) else found:
            yield from _tensors(value, depth - 1)


def _culprit(model: nn.Module, memo: Mapping[int, Any]) -> str:
    """Which attribute of which module can't be copied, as a part of a sentence."""
    for name, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            if attribute == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                kept = f"{attribute!r} ({type(value).__name__})"
                return f", for {_named(name, module)} keeps {kept}: take it off, quantize, and set it again"
    return ""


def _named(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else f"the model itself ({type(module).__name__})"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".strip(": ")
