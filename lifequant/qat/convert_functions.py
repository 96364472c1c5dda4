"""Find where a model calls ReLU as a function. No module stands there, so ``quantize_model`` can put no quantizer there.

``torch.fx`` traces a copy of the model that has no weights. Its trace shows every call, and which layers take the result.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import operator
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from lifequant.qat.copying import copied

RELU = {F.relu, F.relu6, torch.relu, torch.relu_}
RELU_METHODS = {"relu", "relu_"}
# What gives values of its input, and no others but zero.
KEEPING = {
    F.pad, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.dropout, F.dropout2d,
    torch.max_pool2d, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.cat, torch.concat, torch.stack,
    torch.chunk, torch.split, operator.getitem,
}  # fmt: skip
KEEPING_METHODS = {
    "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split",
}  # fmt: skip
KEEPING_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.Flatten, nn.Identity, nn.ChannelShuffle, nn.PixelShuffle,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
CALLED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.ReLU, nn.ReLU6)  # a trace looks into no such layer or subclass
OURS = ("lifequant.qat.", "lifequant.quantizers.")  # nor into modules of these packages


@dataclass
class Trace:
    """A model's graph, and its modules by their names; these have no weights."""

    graph: fx.Graph
    modules: dict[str, nn.Module]


@dataclass
class FunctionCalls:
    """Calls of ReLU as a function. Names are those of named_modules()."""

    callers: Counter[str] = field(default_factory=Counter)  # {module whose forward calls: how often}
    behind: list[str] = field(default_factory=list)  # modules that take what such a call gave


def trace(model: nn.Module, train: bool = True) -> Trace:
    """The trace of ``model``, which does not change, in train mode or as it is.

    Quantized layers are not looked into. Raises whatever the model's forward raises.
    """
    with _aside():
        skeleton = _without_weights(model)
        skeleton.train(train or skeleton.training)
        given = inspect.signature(skeleton.forward).parameters.values()
        defaults = {p.name: p.default for p in given if p.default is not p.empty}
        return Trace(_Tracer().trace(skeleton, concrete_args=defaults), dict(skeleton.named_modules()))


def try_trace(model: nn.Module) -> Trace | None:
    """The trace of ``model``; None if it can't be traced."""
    try:
        return trace(model)
    except Exception:  # a model may do anything in its forward; calibrate() finds its float inputs
        return None


def find_function_calls(model: nn.Module, traced: Trace | None) -> FunctionCalls:
    """Calls of ReLU as a function in ``model``, whose trace is ``traced``. Without a trace they are not found."""
    found = FunctionCalls()
    for name, module in model.named_modules():
        is_transformer = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        if is_transformer and module.activation in (F.relu, torch.relu):
            found.callers[name] += 1
            found.behind.append(f"{name}.linear2".lstrip("."))
    if traced is None:
        return found
    values = _Values(traced.modules)
    for node in traced.graph.nodes:
        if is_relu(node):
            *_, (caller, _) = [("", None), *node.meta.get("nn_module_stack", {}).values()]
            found.callers[caller] += 1
        elif node.op == "call_module" and any(map(values.of_function, node.all_input_nodes)):
            found.behind.append(node.target)
    return found


def is_shifted_windows(module: nn.Module) -> bool:
    """Whether it is the attention of torchvision's Swin Transformer, found by name so that torchvision is not imported."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(module).__mro__}
    return ("torchvision.models.swin_transformer", "ShiftedWindowAttention") in kinds


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, CALLED)
            or is_shifted_windows(m)
            or (isinstance(m, nn.modules.batchnorm._BatchNorm) and type(m).forward.__module__.startswith("torch.nn."))
            or type(m).__module__.startswith(OURS)
            or super().is_leaf_module(m, module_qualified_name)
        )


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Inside, the model's forward prints nothing, warns of nothing and draws from no random number generator for good."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")
        yield


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes and no values, and no hooks: what it does leaves ``model`` alone."""
    memo: dict[int, object] = {}
    for t in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(t, device="meta")
        memo[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
    skeleton = copied(model, "trace", memo)
    for module in skeleton.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return skeleton


class _Values:
    """Where the values of a traced graph's nodes come from."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules

    @functools.cache  # noqa: B019  (a graph's walk is short-lived)
    def of_function(self, node: fx.Node) -> bool:
        """Whether some of them are what a ReLU function gave, and no quantizer gave them before."""
        if is_relu(node):
            return not self.of_module(node)
        return keeps_values(node, self.modules) and any(map(self.of_function, node.all_input_nodes))

    @functools.cache  # noqa: B019
    def of_module(self, node: fx.Node) -> bool:
        """Whether all of them are what an nn.ReLU gave, which becomes a quantizer."""
        if node.op == "call_module" and type(self.modules[node.target]) in (nn.ReLU, nn.ReLU6):
            return True
        inputs = node.all_input_nodes
        return bool(inputs) and (keeps_values(node, self.modules) or is_relu(node)) and all(map(self.of_module, inputs))


def keeps_values(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether all values are those of its inputs, or zero."""
    if node.op == "call_module":
        return isinstance(modules[node.target], KEEPING_MODULES)
    return node.target in (KEEPING if node.op == "call_function" else KEEPING_METHODS)


def is_relu(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in RELU) or (
        node.op == "call_method" and node.target in RELU_METHODS
    )
