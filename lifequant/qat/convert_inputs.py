"""Which layer inputs of a model need a quantizer of their own, from a trace of the model."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from lifequant.qat.convert_functions import Trace, is_relu, keeps_values

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase)
NEVER_NEGATIVE = {
    F.sigmoid, torch.sigmoid, F.hardsigmoid, F.softmax, torch.softmax, F.softplus, torch.abs, torch.exp, torch.square,
    operator.abs,
}  # fmt: skip
NEVER_NEGATIVE_METHODS = {"sigmoid", "softmax", "abs", "exp", "square"}
NEVER_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus)
# What gives nothing negative of nothing negative.
POSITIVE = {
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    torch.mean, torch.sum, torch.add, torch.mul, operator.add, operator.mul, operator.iadd, operator.imul,
}  # fmt: skip
POSITIVE_METHODS = {"mean", "sum", "add", "add_", "mul", "mul_"}
POSITIVE_MODULES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip


@dataclass
class Input:
    """What a layer takes, at all of its calls."""

    quantized: bool  # a ReLU's quantizer gave all of it, or the model was given it
    image: bool  # the model was given it: no layer stands in front
    signed: bool = True  # whether any of it may be below zero
    nodes: frozenset[fx.Node] = field(default_factory=frozenset)  # layers with the same nodes share a tensor


class Inputs:
    """The inputs of the modules that a trace calls. ``quantizers`` are the names of ReLUs that become quantizers."""

    def __init__(self, trace: Trace, quantizers: set[str]) -> None:
        self.trace, self.quantizers = trace, quantizers
        self.calls: dict[str, list[fx.Node]] = {}
        for node in trace.graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(node.target, []).append(node)

    def of(self, name: str, place: int = 0, keyword: str = "input") -> Input | None:
        """The input of module ``name``, its argument ``place`` or ``keyword``; None if no call of it is in the trace."""
        nodes = {_argument(node, place, keyword) for node in self.calls.get(name, ())}
        if not nodes or not all(isinstance(node, fx.Node) for node in nodes):
            return None
        image = all(map(self.image, nodes))
        quantized = image or all(self.image(n) or self.of_one_quantizer(n) for n in nodes)
        return Input(quantized, image, not all(map(self.never_negative, nodes)), frozenset(nodes))

    def of_one_quantizer(self, node: fx.Node) -> bool:
        origins = self.origins(node)
        return len(origins) == 1 and next(iter(origins)) in self.quantizers

    @functools.cache  # noqa: B019  (a graph's walk is short-lived)
    def origins(self, node: fx.Node) -> frozenset[str | fx.Node]:
        """Where the values of ``node`` come from: names of ReLUs that become quantizers, and other nodes."""
        if node.op == "call_module" and node.target in self.quantizers:
            return frozenset([node.target])
        if keeps_values(node, self.trace.modules) and (given := list(_tensors(node))):
            return frozenset().union(*map(self.origins, given))
        if is_relu(node) and self.of_one_quantizer(given := next(_tensors(node))):
            return self.origins(given)
        return frozenset([node])

    @functools.cache  # noqa: B019
    def image(self, node: fx.Node) -> bool:
        """Whether the model was given it: no layer with a weight stands in front."""
        if node.op == "placeholder":
            return True
        if node.op == "call_module":
            module = self.trace.modules[node.target]
            if any(p.dim() > 1 for p in module.parameters()) or isinstance(module, WEIGHTED):
                return False
        given = [n for n in node.all_input_nodes if n.op != "get_attr"]
        return node.op != "get_attr" and bool(given) and all(map(self.image, given))

    @functools.cache  # noqa: B019
    def never_negative(self, node: fx.Node) -> bool:
        if is_relu(node) or _is_one_of(
            node, NEVER_NEGATIVE, NEVER_NEGATIVE_METHODS, NEVER_NEGATIVE_MODULES, self.trace
        ):
            return True
        if keeps_values(node, self.trace.modules):
            given = list(_tensors(node))
            return bool(given) and all(map(self.never_negative, given))
        if _is_one_of(node, POSITIVE, POSITIVE_METHODS, POSITIVE_MODULES, self.trace):
            numbers = [n for n in node.args if isinstance(n, int | float) and not isinstance(n, bool)]
            numbers = [] if _averages(node) else numbers  # a pool's size, a mean's dimensions
            given = list(_tensors(node))
            rest = [n for n in node.args[1:] if isinstance(n, fx.Node)]
            return (
                bool(given) and all(map(self.never_negative, given + rest)) and min(numbers, default=0) >= 0
                and not node.kwargs.keys() & {"other", "alpha"}
            )  # fmt: skip
        return False


def _averages(node: fx.Node) -> bool:
    return node.op == "call_module" or any(word in str(node.target) for word in ("pool", "mean", "sum"))


def _is_one_of(node: fx.Node, functions: set, methods: set[str], modules: tuple[type, ...], trace: Trace) -> bool:
    if node.op == "call_module":
        return isinstance(trace.modules[node.target], modules)
    return node.target in (functions if node.op == "call_function" else methods if node.op == "call_method" else ())


def _argument(node: fx.Node, place: int, keyword: str) -> object:
    return node.args[place] if len(node.args) > place else node.kwargs.get(keyword)


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes of the first argument: of a list, all of them. Others are sizes and dimensions."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    for part in first if isinstance(first, list | tuple) else [first]:
        if isinstance(part, fx.Node):
            yield part
