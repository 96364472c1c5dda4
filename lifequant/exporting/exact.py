"""The exact form: integer convolutions whose sums become float at once, so that nothing is rounded that training did not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from lifequant.exporting.graph import Graph, array, number, placeholder_of


def make_exact(graph: Graph, integer: bool = True) -> None:
    """Replace each convolution of codes with stored weights, in place, and each product of a linear layer.

    What stays a float convolution, all of them without ``integer``, takes its codes by a cast: onnxruntime would round the
    bias, and weights that are float, of one behind a DequantizeLinear (its WeightBiasQuantization), which flips codes.

    conv(s_x (k - z) + o, s_w w) = s_x s_w conv_integer(k, w) + o conv(1, s_w w): where activations have an offset, the second
    term is a map, for padding adds no offset.
    """
    for node in graph.nodes("Conv", "Gemm", "MatMul"):
        codes, weight = placeholder_of(node.inputs[0], "Dequantize"), placeholder_of(node.inputs[1], "Weight")
        if codes is not None and node.op_type == "Conv" and (weight is None or not integer):
            codes.attributes["cast"] = ir.AttrInt64("cast", 1)
        if codes is None or weight is None or not integer:
            continue
        if node.op_type == "Conv":
            _convolution(graph, node, codes, weight)
        else:
            _product(graph, node, codes, weight)
    graph.clean()


def _convolution(graph: Graph, node: ir.Node, codes: ir.Node, weight: ir.Node) -> None:
    stored, scale = array(weight.inputs[0]), array(weight.inputs[1]).astype(np.float64)
    shape = (1, -1, *[1] * (stored.ndim - 2))
    kept = {a.name: a for a in node.attributes.values()}
    inputs = [codes.inputs[0], *_unsigned(graph, stored, codes)]
    sums = graph.add(node, "ConvInteger", inputs, ir.DataType.INT32, **kept)
    sums.shape = node.outputs[0].shape
    bias = np.zeros(stored.shape[0]) if len(node.inputs) < 3 or node.inputs[2] is None else array(node.inputs[2])
    bias = bias.reshape(shape)
    if number(codes, "offset"):
        bias = bias + number(codes, "offset") * scale.reshape(shape if scale.ndim else ()) * _reached(
            node, codes, stored
        )
    _finish(graph, node, sums, number(codes, "scale") * scale.reshape(shape if scale.ndim else ()), bias)


def _unsigned(graph: Graph, stored: np.ndarray, codes: ir.Node) -> list[ir.Value]:
    """(weights as uint8 codes, zero point of the input, zero point of the weights).

    onnxruntime's kernels for int8 weights saturate on a CPU without VNNI. Its ConvInteger for them is slower, and version
    1.20 has none.
    """
    weights = (stored.astype(np.int16) + 128).astype(np.uint8)
    zeros = [graph.constant(np.uint8(value), "zero") for value in (number(codes, "zero"), 128)]
    return [graph.constant(weights, "codes"), *zeros]


def _reached(node: ir.Node, codes: ir.Node, stored: np.ndarray) -> np.ndarray:
    """conv(1, codes of the weight): how much weight lies inside the image at each place, float64 [1, C, H, W]."""
    names = {"pads": [0] * 4, "strides": [1, 1], "dilations": [1, 1]}
    pads, strides, dilations = (list(node.attributes[n].value) if n in node.attributes else d for n, d in names.items())
    size = [int(side) for side in node.inputs[0].shape[2:]]
    ones = torch.ones(1, node.inputs[0].shape[1], *size, dtype=torch.float64)
    ones = torch.nn.functional.pad(ones, (pads[1], pads[3], pads[0], pads[2]))
    kernel = torch.from_numpy(stored.astype(np.float64))
    return torch.nn.functional.conv2d(ones, kernel, None, strides, 0, dilations, int(number(node, "group", 1))).numpy()


def _product(graph: Graph, node: ir.Node, codes: ir.Node, weight: ir.Node) -> None:
    stored, scale = array(weight.inputs[0]), array(weight.inputs[1]).astype(np.float64)
    turned = node.op_type == "Gemm" and number(node, "transB")
    if node.op_type == "Gemm" and (
        number(node, "transA") or number(node, "alpha", 1) != 1 or number(node, "beta", 1) != 1
    ):
        return
    matrix = np.ascontiguousarray(stored.T) if turned else stored
    inputs = [codes.inputs[0], *_unsigned(graph, matrix, codes)]
    sums = graph.add(node, "MatMulInteger", inputs, ir.DataType.INT32)
    sums.shape = node.outputs[0].shape
    bias = np.zeros(()) if len(node.inputs) < 3 or node.inputs[2] is None else array(node.inputs[2])
    if number(codes, "offset"):
        bias = bias + number(codes, "offset") * scale * matrix.astype(np.float64).sum(0)
    _finish(graph, node, sums, number(codes, "scale") * scale, bias)


def _finish(graph: Graph, node: ir.Node, sums: ir.Value, scale: np.ndarray, bias: np.ndarray) -> None:
    value = graph.add(node, "Cast", [sums], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    value = graph.add(node, "Mul", [value, graph.constant(scale.astype(np.float32), "scale")])
    if bias.any():
        value = graph.add(node, "Add", [value, graph.constant(bias.astype(np.float32), "bias")])
    graph.replace(node, value)
