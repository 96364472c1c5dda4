"""onnxruntime: what an ONNX file computes, and with which kernels."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import import_module, metadata

import numpy as np

from lifequant.common.errors import UserError
from lifequant.runtime.onnx_session import session

OLDEST = {"onnxruntime": (1, 20), "onnx": (1, 17), "onnxscript": (0, 5), "torch": (2, 8)}  # INT4; symbolic operators
INTEGER = ("QLinearConv", "ConvInteger")


def needed(*names: str) -> None:
    """Raises UserError where a package is missing or too old."""
    for name in names:
        try:
            import_module(name)
            found = metadata.version("onnxruntime-gpu" if name == "onnxruntime" and _is_gpu_build() else name)
        except ImportError:
            raise UserError(f'export needs {name}, which is not installed: pip install "lifequant[export]"') from None
        oldest = OLDEST.get(name, ())
        if tuple(int(part) for part in found.split(".")[:2]) < oldest:
            raise UserError(
                f"export needs {name} {'.'.join(map(str, oldest))} or newer, and {found} is installed: pip install --upgrade {name}"
            )


def _is_gpu_build() -> bool:
    return any(d.metadata["Name"] == "onnxruntime-gpu" for d in metadata.distributions())


def outputs(model: bytes, batches: Iterable[np.ndarray], threads: int = 0) -> np.ndarray:
    """The first output over all batches, joined."""
    running = session(model, threads)
    name = running.get_inputs()[0].name
    return np.concatenate([running.run(None, {name: batch})[0] for batch in batches])


def kernels(model: bytes) -> Counter[str]:
    """{operator: how often onnxruntime's optimized graph has it}"""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "optimized.onnx")
        session(model, 1, path)
        return Counter(node.op_type for node in onnx.load(path).graph.node)


def convolutions(counts: Counter[str]) -> tuple[int, int]:
    """(integer, float) convolutions among ``kernels``."""
    whole = sum(counts[name] for name in INTEGER)
    return whole, sum(n for name, n in counts.items() if "Conv" in name and name not in INTEGER)


def ranges(model: bytes, names: list[str], batches: Iterable[np.ndarray]) -> Mapping[str, tuple[float, float]]:
    """{output, or the input: (smallest, largest value)} over all batches."""
    running = session(model)
    given = running.get_inputs()[0].name
    found = {name: (np.inf, -np.inf) for name in names}
    asked = [name for name in names if name != given]
    for batch in batches:
        values = {given: batch, **dict(zip(asked, running.run(asked, {given: batch}) if asked else (), strict=True))}
        for name in names:
            value = values[name]
            low, high = found[name]
            found[name] = (min(low, float(value.min())), max(high, float(value.max())))
    return found
