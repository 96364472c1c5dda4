"""Lifelong quantization-aware training: ProxQ and BaLL on small quantized networks.

``lifequant.load(job_dir)`` gives a trained model; ``lifequant.options.make(...)`` and ``lifequant.train.run(config)``
train one from Python; ``lifequant.quantize_model(model)`` and ``lifequant.calibrate(q, batches)`` quantize any torch
model for a loop of your own, and ``lifequant.fold_batchnorm(q)`` makes it ready for inference; ``lifequant.registry`` has
methods, penalties, quantizers and models by name.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

_MODULE_OF = {
    "calibrate": "lifequant.qat.convert",
    "export": "lifequant.exporting.api",
    "fold_batchnorm": "lifequant.qat.folding",
    "load": "lifequant.predict",
    "quantize_model": "lifequant.qat.convert",
}
__all__ = ["calibrate", "export", "fold_batchnorm", "load", "quantize_model"]


def __dir__() -> list[str]:
    """What is public; the modules that have been imported are reached all the same."""
    return ["__version__", *__all__]


def __getattr__(name: str) -> Any:
    """Imports what is asked for at its first use, so that ``lifequant --help`` need not wait for torch."""
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if name == "__version__":
        try:
            return metadata.version("lifequant")
        except metadata.PackageNotFoundError:
            return "not installed"  # a bare clone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
