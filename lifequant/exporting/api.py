"""``lifequant.export``: a network of ``quantize_model`` as an ONNX file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lifequant
from lifequant.checkpointing import checkpoint
from lifequant.common.errors import UserError
from lifequant.exporting import run
from lifequant.exporting.parity import Parity, compare


@dataclass
class Exported:
    """What ``export`` wrote."""

    path: Path
    bytes: int
    integer_convolutions: int
    float_convolutions: int
    parity: Parity  # on the calibration images
    notes: list[str]  # what could not become integers as it is

    def __str__(self) -> str:
        counts = f"{self.integer_convolutions} convolutions in integers, {self.float_convolutions} in float"
        return "\n".join([f"{self.path}: {self.bytes:,} bytes, {counts}", str(self.parity), *self.notes])


def export(
    q: nn.Module,
    path: str | Path,
    example_input: Tensor,
    integer: str = "fast",
    weights: str = "int8",
    calibration: Iterable[Tensor] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> Exported:
    """Write ``q``, a network of ``quantize_model`` with one input and one output, as ONNX; return what was written.

    ``example_input`` is a batch [n, ...] as the network takes it; n is free in the file, whose input is ``images`` and whose
    output is ``logits``. ``integer="fast"`` gives 8 bits to what training left in float, for ranges that the batches of
    ``calibration`` show (default: ``example_input``), so that onnxruntime computes in integers throughout; ``"exact"`` rounds
    nothing that training did not round. ``weights="int4"`` stores weights of 4 bits and less in 4 bits. The file is written
    even where predictions differ: look at ``parity``. Raises UserError where the network can't be exported.
    """
    from lifequant.exporting.onnx_file import FORMS, WIDTHS, make_onnx

    run.needed("onnx", "onnxruntime", "onnxscript", "torch")
    for name, value, known in (("integer", integer, FORMS), ("weights", weights, WIDTHS)):
        if value not in known:
            raise UserError(f"export, {name}: {value!r} is not offered (known: {', '.join(known)})")
    batches = [batch.cpu() for batch in (calibration if calibration is not None else [example_input])]
    facts = {"lifequant": lifequant.__version__, **(metadata or {})}
    arrays = [batch.numpy() for batch in batches]
    made = make_onnx(q, example_input.cpu(), integer, weights, arrays, facts)
    parity = compare(_logits(q, batches), run.outputs(made.content, arrays), None)
    counts = run.convolutions(run.kernels(made.content))
    checkpoint.write_bytes(Path(path), made.content)
    return Exported(Path(path), len(made.content), *counts, parity, made.notes)


def _logits(q: nn.Module, batches: Iterable[Tensor]) -> np.ndarray:
    from lifequant.qat.modes import eval_mode

    device = next((p.device for p in q.parameters()), None)
    with eval_mode(q), torch.inference_mode():
        return torch.cat([q(batch.to(device)).float().cpu() for batch in batches]).numpy()
