"""Lifelong quantization-aware training: ProxQ and BaLL on small quantized networks.

``lifequant.load(job_dir)`` gives a trained model; ``lifequant.options.make(...)`` and ``lifequant.train.run(config)``
train one from Python; ``lifequant.quantize_model(model)`` and ``lifequant.calibrate(q, batches)`` quantize any torch
model for a loop of your own; ``lifequant.registry`` has methods, quantizers and models by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifequant.predict import load
    from lifequant.qat.convert import calibrate, quantize_model

__all__ = ["calibrate", "load", "quantize_model"]
_WHERE = {"calibrate": "convert", "load": "predict", "quantize_model": "convert"}


def __getattr__(name: str) -> Any:
    """On its first use: importing the package does not import torch, so that --help is quick."""
    if name in _WHERE:
        return getattr(import_module(f"lifequant.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
