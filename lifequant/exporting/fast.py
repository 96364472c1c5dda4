"""The fast form: what goes into or comes out of a convolution or a sum has 8 bits at most.

Where training had a quantizer, that is its b-bit code. Where it had none (the image, the branches of a sum), a quantizer of
8 bits is put, for the range that training images give. onnxruntime then fuses each convolution with what surrounds it into a
QLinearConv, and each sum into a QLinearAdd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from lifequant.exporting.deploy import DOMAIN
from lifequant.exporting.graph import MOVING, Graph, array, made_by, number, only_user, placeholder_of

Range = tuple[float, float]
SMALLEST = 1e-30  # scale of a channel that gives 0
SUM_OF_TWO = 2**15 - 1  # onnxruntime's kernels for signed weights add two products in 16 bits on a CPU without VNNI


def make_fast(graph: Graph, measure: Callable[[list[str]], Mapping[str, Range]], wide: bool = True) -> None:
    """Put the quantizers, in place. ``measure`` gives (low, high) of the tensors that it is given by name.

    With ``wide``, codes of weights take all of int8 (see ``_store_bias``).
    """
    wanted = _without_quantizer(graph)
    ranges = measure([value.name for value in wanted])
    for value in wanted:
        _quantize(graph, value, *ranges[value.name])
    for node in graph.nodes("Conv", "Gemm"):
        _store_bias(graph, node, wide)
    graph.clean()


def _without_quantizer(graph: Graph) -> list[ir.Value]:
    """The tensors that get one, in order."""
    found: dict[ir.Value, None] = {}
    for node in graph.nodes("Conv"):
        if placeholder_of(node.inputs[1], "Weight") is None:
            continue
        if placeholder_of(node.inputs[0], "Dequantize") is None:
            found[node.inputs[0]] = None
        if (given := _given(node)) is not None:
            found[given] = None
    for node in graph.nodes("Add"):
        if all(_has_codes(value) or value in found for value in node.inputs):
            found |= dict.fromkeys(v for v in node.inputs if not _has_codes(v))
            if (given := _given(node)) is not None:
                found[given] = None
    order = {value: i for i, value in enumerate(v for node in graph.nodes() for v in node.outputs)}
    return sorted(found, key=lambda value: order.get(value, -1))


def _has_codes(value: ir.Value | None) -> bool:
    return placeholder_of(value, "Dequantize") is not None


def _given(node: ir.Node) -> ir.Value | None:
    """What a node gives, behind the activation that onnxruntime fuses; None if a quantizer takes it, or it is an output."""
    value = node.outputs[0]
    user = only_user(value)
    if user is not None and user.op_type in ("Relu", "Clip"):
        value, user = user.outputs[0], only_user(user.outputs[0])
    is_taken = user is not None and user.domain == DOMAIN and user.op_type == "Quantize" and not number(user, "offset")
    return None if is_taken or value.is_graph_output() else value


def _quantize(graph: Graph, value: ir.Value, low: float, high: float) -> None:
    """8 bits for ``value``, whoever takes it."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32(max(high - low, 1e-8) / 255))
    zero = round(-low / scale)
    users = list(value.uses())
    first = users[0].node  # clean() brings all into order
    codes = graph.add(
        first,
        "Quantize",
        [value],
        ir.DataType.UINT8,
        DOMAIN,
        scale=scale,
        offset=0.0,
        zero=zero,
        low=-zero,
        high=255 - zero,
    )
    back = graph.add(first, "Dequantize", [codes], ir.DataType.FLOAT, DOMAIN, scale=scale, offset=0.0, zero=zero)
    for user in users:
        user.node.replace_input_with(user.idx, back)


def _store_bias(graph: Graph, node: ir.Node, wide: bool) -> None:
    """An integer convolution's bias is int32, in units of its sums.

    A unit may be a percent of the quantizer's step behind it, too coarse where values lie near the middle of two codes. So
    the weights' codes are multiplied by the power of two that int8 has room for, and their scale is divided by it. A channel
    that is nearly all bias keeps it, and less of the rest.
    """
    codes, weight = placeholder_of(node.inputs[0], "Dequantize"), placeholder_of(node.inputs[1], "Weight")
    bias = array(node.inputs[2]) if len(node.inputs) > 2 else None
    if codes is None or weight is None or bias is None or number(codes, "offset"):
        return
    stored, scale = array(weight.inputs[0]), array(weight.inputs[1]).astype(np.float64)
    most = SUM_OF_TWO // (2 * _highest_code(codes))
    largest = max(int(np.abs(stored.astype(int)).max()), 1)
    room = int(np.log2(min(127, max(most, largest)) / largest)) if wide else 0
    scale = np.broadcast_to(scale / 2**room, bias.shape)
    wider = np.maximum(scale, np.abs(bias) / 2**30 / number(codes, "scale")).clip(min=SMALLEST)
    fitted = stored * (2**room * scale / wider).reshape(-1, *[1] * (stored.ndim - 1))
    inputs = [
        graph.constant(np.rint(fitted).astype(np.int8), "codes"),
        graph.constant(wider.astype(np.float32), "scale"),
    ]
    signed = int(largest * 2**room <= most)
    node.replace_input_with(1, graph.add(node, "Weight", inputs, ir.DataType.FLOAT, DOMAIN, axis=0, signed=signed))
    unit = wider * number(codes, "scale")
    inputs = [
        graph.constant(np.rint(bias / unit).astype(np.int32), "bias"),
        graph.constant(unit.astype(np.float32), "scale"),
    ]
    node.replace_input_with(2, graph.add(node, "DequantizeLinear", inputs, ir.DataType.FLOAT, axis=0))


def _highest_code(codes: ir.Node) -> int:
    """The highest code that a Dequantize may be given; 255 where something other than a quantizer gives it."""
    value = codes.inputs[0]
    while (mover := made_by(value, *MOVING)) is not None:
        value = mover.inputs[0]
    made = placeholder_of(value, "Quantize")
    return (
        255
        if made is None
        else max(int(number(made, "high")) + int(number(made, "zero")), int(number(codes, "zero")), 1)
    )
