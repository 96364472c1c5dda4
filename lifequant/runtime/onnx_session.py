"""onnxruntime, for the ONNX files that ``lifequant export`` writes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from lifequant.common.errors import UserError
from lifequant.common.safe_files import short


def session(model: bytes | str | Path, threads: int = 0, optimized: str | None = None) -> Any:
    """A session on the CPU; 0 threads are as many as there are cores; ``optimized`` is where the optimized graph is written.

    Raises UserError where onnxruntime is not installed or can't read the model.
    """
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError:
        raise UserError('ONNX files need the package onnxruntime: pip install "lifequant[export]"') from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised
    if optimized:
        options.optimized_model_filepath = optimized
    content = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has no base class of its own
        where = "the exported graph" if isinstance(model, bytes) else model
        raise UserError(f"{where}: onnxruntime can't read it ({short(error)}): export it anew") from None
