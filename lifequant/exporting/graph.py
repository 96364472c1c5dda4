"""Small tools for a graph of onnx_ir, and the edits that hold for every form of export."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common

from lifequant.exporting.deploy import DOMAIN

# What moves values and changes none: the codes can pass it in place of what they stand for.
MOVING = {"MaxPool", "Slice", "Pad", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}


class Graph:
    """A model's graph, with short ways to read and change it."""

    def __init__(self, model: ir.Model, count: int = 0) -> None:
        self.model, self.graph = model, model.graph
        self._count = count  # of names that were given

    def copy(self) -> Graph:
        return Graph(ir.from_proto(ir.to_proto(self.model)), self._count)

    def bytes(self) -> bytes:
        """The ONNX file's content."""
        return ir.to_proto(self.model).SerializeToString()

    def nodes(self, *types: str, domain: str = "") -> list[ir.Node]:
        """The nodes of these types, in order; all without a type."""
        return [n for n in self.graph if not types or (n.op_type in types and n.domain == domain)]

    def placeholders(self, *types: str) -> list[ir.Node]:
        return self.nodes(*types, domain=DOMAIN)

    def add(
        self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None = None,
        domain: str = "", **attributes: object,
    ) -> ir.Value:  # fmt: skip
        """The output of a new node, whose shape is that of its first input until shapes are inferred."""
        node = ir.node(op_type, inputs, attributes, domain=domain)
        self._count += 1
        node.name = f"{op_type}/{self._count}"
        out = node.outputs[0]
        out.name = f"{op_type.lower()}/{self._count}"
        out.dtype = dtype or inputs[0].dtype
        out.shape = inputs[op_type == "Gather"].shape  # a table has another one than its index
        self.graph.insert_before(before, node)
        return out

    def constant(self, array: np.ndarray | ir.TensorProtocol, name: str = "constant") -> ir.Value:
        """A new initializer."""
        self._count += 1
        tensor = ir.tensor(array, name=f"{name}/{self._count}")
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def replace(self, node: ir.Node, by: ir.Value) -> None:
        """Whoever takes the node's output takes ``by``; the node goes."""
        old = node.outputs[0]
        if by.shape is None:
            by.shape = old.shape
        ir.convenience.replace_all_uses_with(old, by, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def clean(self) -> None:
        """Take away what nothing uses, and bring the nodes into order."""
        ir.passes.common.RemoveUnusedNodesPass()(self.model)
        self.graph.sort()


def made_by(value: ir.Value | None, *types: str, domain: str = "") -> ir.Node | None:
    """The node that gives ``value``, if it is of one of these types."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in types and node.domain == domain else None


def placeholder_of(value: ir.Value | None, *types: str) -> ir.Node | None:
    return made_by(value, *types, domain=DOMAIN)


def array(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def number(node: ir.Node, name: str, default: float = 0.0) -> float:
    found = node.attributes.get(name)
    return default if found is None else found.value


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that takes ``value``, if there is one alone and the graph does not give the value out."""
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def settle(graph: Graph) -> None:
    """The edits that every form begins with."""
    _hold_linear_weights(graph)
    _clamp_codes(graph)
    _slice_once(graph)
    _dequantize_late(graph)
    graph.clean()


def _hold_linear_weights(graph: Graph) -> None:
    """A weight is transposed once and for all."""
    for node in graph.nodes("Transpose"):
        weight = placeholder_of(node.inputs[0], "Weight")
        if weight is None:
            continue
        turn = node.attributes["perm"].value
        codes = graph.constant(np.ascontiguousarray(array(weight.inputs[0]).transpose(turn)), "codes")
        axis = list(turn).index(int(number(weight, "axis")))
        graph.replace(
            node, graph.add(node, "Weight", [codes, weight.inputs[1]], node.outputs[0].dtype, DOMAIN, axis=axis)
        )


def _clamp_codes(graph: Graph) -> None:
    """A ReLU (or a clamp, as ReLU6) before a quantizer becomes its bounds: rounding is monotone, so nothing changes."""
    for node in graph.placeholders("Quantize"):
        while (before := made_by(node.inputs[0], "Relu", "Clip")) is not None:
            bounds = (
                [0.0, None] if before.op_type == "Relu" else [_scalar(v) for v in [*before.inputs[1:], None, None][:2]]
            )
            scale, offset = number(node, "scale"), number(node, "offset")
            low, high = int(number(node, "low")), int(number(node, "high"))
            least, most = (None if b is None else int(np.round((b - offset) / scale)) for b in bounds)
            low = low if least is None else min(max(low, least), high)
            high = high if most is None else max(min(high, most), low)
            node.attributes["low"], node.attributes["high"] = ir.AttrInt64("low", low), ir.AttrInt64("high", high)
            node.replace_input_with(0, before.inputs[0])
    for node in graph.nodes("Relu"):
        codes = placeholder_of(node.inputs[0], "Dequantize")
        if codes is not None and not number(codes, "zero") and number(codes, "offset") >= 0:
            graph.replace(node, node.inputs[0])


def _scalar(value: ir.Value | None) -> float | None:
    found = array(value)
    return None if found is None else float(found.reshape(-1)[0])


def _slice_once(graph: Graph) -> None:
    """Two slices along different axes become one."""
    for node in graph.nodes("Slice"):
        before = made_by(node.inputs[0], "Slice")
        if before is None or only_user(before.outputs[0]) is not node:
            continue
        parts = [[array(v) for v in n.inputs[1:]] for n in (before, node)]
        if any(len(part) != 4 or any(p is None for p in part) for part in parts) or set(parts[0][2]) & set(parts[1][2]):
            continue
        joined = [graph.constant(np.concatenate(pair), "slice") for pair in zip(*parts, strict=True)]
        out = graph.add(node, "Slice", [before.inputs[0], *joined], node.outputs[0].dtype)
        out.shape = node.outputs[0].shape
        graph.replace(node, out)


def _dequantize_late(graph: Graph) -> None:
    """Codes are moved, pooled and padded in place of the values, so that a convolution takes them as they are."""
    for node in graph.nodes(*MOVING):
        codes = placeholder_of(node.inputs[0], "Dequantize")
        if codes is None or (len(node.outputs) > 1 and node.outputs[1].uses()):
            continue
        inputs = [codes.inputs[0], *node.inputs[1:]]
        if node.op_type == "Pad":
            fill = _scalar(inputs[2]) if len(inputs) > 2 else 0.0
            if node.attributes.get_string("mode", "constant") == "constant" and (
                fill != 0.0 or number(codes, "offset")
            ):
                continue
            inputs = [*inputs[:2], graph.constant(np.uint8(number(codes, "zero")), "zero"), *inputs[3:]]
        moved = graph.add(
            node, node.op_type, inputs, ir.DataType.UINT8, **{a.name: a for a in node.attributes.values()}
        )
        moved.shape = node.outputs[0].shape
        kept = {a.name: a for a in codes.attributes.values()}
        graph.replace(node, graph.add(node, "Dequantize", [moved], ir.DataType.FLOAT, DOMAIN, **kept))
