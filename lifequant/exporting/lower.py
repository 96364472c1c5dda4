"""Placeholders become ONNX's own operators."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lifequant.exporting.graph import Graph, array, number, placeholder_of


def lower(graph: Graph, int4: bool = False, in_float: bool = False) -> None:
    """In place. With ``int4``, weights that 4 bits hold are stored in INT4. With ``in_float``, no layer that takes a weight
    becomes one of integers, so onnxruntime may compute the weights' values once, when it loads the file."""
    for node in graph.placeholders("Levels"):
        graph.replace(node, _levels(graph, node))
    for node in graph.placeholders("Quantize"):
        graph.replace(node, _quantize(graph, node))
    for node in graph.placeholders("Weight"):
        graph.replace(node, _weight(graph, node, int4, in_float))
    for node in graph.placeholders("Dequantize"):
        graph.replace(node, _dequantize(graph, node))
    graph.clean()
    graph.model.opset_imports.pop("lifequant", None)


def _float(graph: Graph, value: float | np.ndarray, name: str) -> ir.Value:
    return graph.constant(np.asarray(value, dtype=np.float32), name)


def _quantize(graph: Graph, node: ir.Node) -> ir.Value:
    x, zero = node.inputs[0], int(number(node, "zero"))
    low, high = (int(number(node, name)) + zero for name in ("low", "high"))
    if number(node, "offset"):
        x = graph.add(node, "Sub", [x, _float(graph, number(node, "offset"), "offset")])
    inputs = [x, _float(graph, number(node, "scale"), "scale"), graph.constant(np.uint8(zero), "zero")]
    codes = graph.add(node, "QuantizeLinear", inputs, ir.DataType.UINT8)
    if (low, high) == (0, 255):  # as uint8 saturates
        return codes
    bounds = [graph.constant(np.uint8(bound), "bound") for bound in (low, high)]
    return graph.add(node, "Clip", [codes, *bounds])


def _dequantize(graph: Graph, node: ir.Node) -> ir.Value:
    zero, scale = graph.constant(np.uint8(number(node, "zero")), "zero"), _float(graph, number(node, "scale"), "scale")
    if number(node, "cast"):
        value = graph.add(node, "Cast", [node.inputs[0]], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        if number(node, "zero"):
            value = graph.add(node, "Sub", [value, _float(graph, number(node, "zero"), "zero")])
        value = graph.add(node, "Mul", [value, scale])
    else:
        value = graph.add(node, "DequantizeLinear", [node.inputs[0], scale, zero], ir.DataType.FLOAT)
    if number(node, "offset"):
        value = graph.add(node, "Add", [value, _float(graph, number(node, "offset"), "offset")])
    return value


def _weight(graph: Graph, node: ir.Node, int4: bool, in_float: bool) -> ir.Value:
    codes, scale = array(node.inputs[0]), array(node.inputs[1])
    shape = [1] * codes.ndim
    axis = int(number(node, "axis"))
    if scale.ndim:
        shape[axis] = -1
    offset = None
    if int4 and not (codes.min() >= -8 and codes.max() <= 7) and (codes % 2 == 1).all() and codes.min() > -16:
        codes, scale, offset = (codes - 1) // 2, 2 * scale, scale.reshape(shape)  # odd codes: 2 j + 1
    if int4 and codes.min() >= -8 and codes.max() <= 7:
        codes = codes.astype(ml_dtypes.int4)
    unsigned = not number(node, "signed", 1) and codes.dtype == np.int8
    if unsigned:  # the kernels for unsigned weights are right on every CPU
        codes = (codes.astype(np.int16) + 128).astype(np.uint8)
    stored = graph.constant(codes, "codes")
    if in_float:
        value = graph.add(node, "Cast", [_int8(graph, node, stored)], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        value = graph.add(node, "Mul", [value, _float(graph, scale.reshape(shape if scale.ndim else ()), "scale")])
    else:
        inputs = [stored, _float(graph, scale, "scale")]
        in_gemm = scale.ndim and any(use.node.op_type == "Gemm" for use in node.outputs[0].uses())
        if in_gemm or unsigned:  # onnxruntime's QGemm wants it, zeros too
            inputs.append(graph.constant(np.full(scale.shape, 128 * unsigned, codes.dtype), "zero"))
        value = graph.add(node, "DequantizeLinear", inputs, ir.DataType.FLOAT, axis=axis)
    return value if offset is None else graph.add(node, "Add", [value, _float(graph, offset, "offset")])


def _int8(graph: Graph, node: ir.Node, codes: ir.Value) -> ir.Value:
    """Codes of 4 bits as 8 bits, in a way that every onnxruntime that knows INT4 computes when it loads the file: it leaves a
    DequantizeLinear for the run, unless one node (here Floor, which changes no code) is between it and a QuantizeLinear.
    """
    if codes.dtype != ir.DataType.INT4:
        return codes
    one, zero = _float(graph, 1, "one"), graph.constant(np.int8(0), "zero")
    value = graph.add(node, "DequantizeLinear", [codes, one], ir.DataType.FLOAT)
    value = graph.add(node, "Floor", [value])
    return graph.add(node, "QuantizeLinear", [value, one, zero], ir.DataType.INT8)


def _levels(graph: Graph, node: ir.Node) -> ir.Value:
    """table[number of thresholds below x]: of 8-bit codes by a table of 256 entries, of float by cells.

    A cell of the range is narrower than two thresholds are apart, so there is one in it at most: its number of thresholds
    below, and one more where x is above the cell's own.
    """
    thresholds = np.asarray(node.attributes["thresholds"].value, dtype=np.float64)
    table = np.asarray(node.attributes["table"].value)
    codes = placeholder_of(node.inputs[0], "Dequantize")
    if codes is not None:
        values = number(codes, "scale") * (np.arange(256) - number(codes, "zero")) + number(codes, "offset")
        found = table[np.searchsorted(thresholds, values)].astype(np.uint8)
        index = graph.add(node, "Cast", [codes.inputs[0]], ir.DataType.INT32, to=int(ir.DataType.INT32))
        return graph.add(node, "Gather", [graph.constant(found, "table"), index], ir.DataType.UINT8)
    width = float(np.diff(thresholds).min(initial=1.0)) * 0.99
    begin = float(thresholds[0]) - width
    starts = begin + width * np.arange(int((thresholds[-1] - begin) / width) + 2)
    below = np.searchsorted(thresholds, starts)
    own = np.append(thresholds, np.inf)[below]
    x = node.inputs[0]
    cell = graph.add(node, "Sub", [x, _float(graph, begin, "begin")])
    cell = graph.add(node, "Floor", [graph.add(node, "Mul", [cell, _float(graph, 1 / width, "cells")])])
    cell = graph.add(node, "Clip", [cell, _float(graph, 0, "bound"), _float(graph, len(starts) - 1, "bound")])
    cell = graph.add(node, "Cast", [cell], ir.DataType.INT32, to=int(ir.DataType.INT32))
    threshold = graph.add(node, "Gather", [_float(graph, own, "thresholds"), cell], ir.DataType.FLOAT)
    base = graph.add(node, "Gather", [graph.constant(below.astype(np.int32), "below"), cell], ir.DataType.INT32)
    above = graph.add(node, "Greater", [x, threshold], ir.DataType.BOOL)
    above = graph.add(node, "Cast", [above], ir.DataType.INT32, to=int(ir.DataType.INT32))
    count = graph.add(node, "Add", [base, above])
    return graph.add(node, "Gather", [graph.constant(table.astype(np.uint8), "table"), count], ir.DataType.UINT8)
