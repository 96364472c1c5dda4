"""A run's model that another run begins from. float_weights.py has those that others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lifequant.checkpointing import checkpoint
from lifequant.common.errors import UserError
from lifequant.config import Config


def is_ours(found: Any) -> bool:
    """Whether what a file holds is one of this package's checkpoints, and not another program's weights."""
    return isinstance(found, dict) and {"schema", "kind"} <= found.keys()


def load_source(path: Path, config: Config, model: nn.Module, num_classes: int) -> bool:
    """Load a source model. True where its quantizers fit and were loaded with it; False where scales must be derived.

    Raises UserError where architecture or class count differ.
    """
    state = checkpoint.read(path, "model")
    source, names, _ = checkpoint.network_of(state, path)
    weights = state["model"]
    for name in ("target_model", "shortcut"):
        if getattr(source, name) != getattr(config, name):
            raise UserError(f"{path}: its {name} is {getattr(source, name)}, this run's is {getattr(config, name)}")
    if len(names) != num_classes:
        raise UserError(f"{path}: it has {len(names)} classes, the data set has {num_classes}")
    quant = ("quantizer", "act_quantizer", "bitW", "abitW", "first_last_bits", "per_channel", "layer_bits")
    if all(getattr(source, name) == getattr(config, name) for name in quant):
        checkpoint.load_strictly(path, model, weights)
        fits = True
    else:
        checkpoint.load_float(path, model, weights)
        fits = False
    checkpoint.refuse_nonfinite(path, model)
    return fits
