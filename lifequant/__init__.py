"""Lifelong quantization-aware training: ProxQ and BaLL on small quantized networks.

``lifequant.load(job_dir)`` gives a trained model; ``lifequant.options.make(...)`` and ``lifequant.train.run(config)``
train one from Python; ``lifequant.registry`` has methods, quantizers and models by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifequant.predict import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """``load`` on its first use: importing the package does not import torch, so that --help is quick."""
    if name == "load":
        from lifequant.predict import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
