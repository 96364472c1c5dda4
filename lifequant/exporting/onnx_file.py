"""A quantized network -> an ONNX file."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lifequant.common.errors import UserError
from lifequant.data.augment import CIFAR
from lifequant.exporting.deploy import FromBytes, deployed
from lifequant.exporting.exact import make_exact
from lifequant.exporting.fast import make_fast
from lifequant.exporting.graph import Graph, settle
from lifequant.exporting.lower import lower
from lifequant.exporting.run import ranges

OPSET = 21  # the first with INT4
FORMS = ("fast", "exact")
WIDTHS = ("int8", "int4")


@dataclass
class OnnxFile:
    """``content`` is the file's; a note says what could not become integers as it is."""

    content: bytes
    notes: list[str] = field(default_factory=list)


def make_onnx(
    q: nn.Module,
    example: Tensor,
    integer: str,
    weights: str,
    calibration: Iterable[np.ndarray],
    facts: Mapping[str, object],
    from_bytes: bool = False,
) -> OnnxFile:
    """``q`` as an ONNX model of one input ``images`` and one output ``logits``.

    ``example`` is an input [n, ...]; n is free in the file. With ``from_bytes`` it is uint8 [n, 3, H, W], and the graph
    normalizes it. ``calibration`` has inputs from which the fast form takes ranges. ``facts`` go into the metadata, as JSON
    where they are no text. Raises UserError where the model can't be exported.
    """
    model, notes = deployed(q, integer == "fast")
    if from_bytes:
        model = FromBytes(model, integer == "fast", getattr(q, "statistics", CIFAR)).eval()
    graph = Graph(_captured(model.eval(), example))
    settle(graph)
    if integer == "fast":
        batches = list(calibration)

        def measure(names: list[str]) -> Mapping[str, tuple[float, float]]:
            probe = graph.copy()
            lower(probe)
            probe.graph.outputs.extend(v for node in probe.graph for v in node.outputs if v.name in names)
            return ranges(probe.bytes(), names, batches)

        make_fast(graph, measure, wide=weights == "int8")
    else:
        make_exact(graph, weights == "int8")
    lower(graph, int4=weights == "int4", in_float=integer == "exact")
    graph.graph.outputs[0].name = "logits"
    _describe(graph.model, facts)
    return OnnxFile(graph.bytes(), notes)


TALKATIVE = ("torch.onnx", "onnxscript")  # loggers that tell a user what he can't act on


def _captured(model: nn.Module, example: Tensor) -> ir.Model:
    """The graph of a model, as torch.onnx gives it, with constants folded."""
    from onnxscript import optimizer

    example = example if len(example) > 1 else torch.cat([example, example])  # torch.export takes a 1 for a constant
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (example,), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), input_names=["images"], output_names=["logits"],
            )  # fmt: skip
        found = program.model
        optimizer.optimize(found)
    except Exception as error:  # torch.export's are of a hundred types
        raise UserError(f"export: torch.onnx can't take the model: {_reason(error)}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    found.graph.inputs[0].shape = ir.Shape(["n", *example.shape[1:]])
    return found


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _describe(model: ir.Model, facts: Mapping[str, object]) -> None:
    """The metadata, and none of what torch notes of a graph's origin, which is most of a small file."""
    ir.passes.common.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "lifequant", str(facts.get("lifequant", ""))
    model.metadata_props.clear()
    for name, value in facts.items():
        model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
