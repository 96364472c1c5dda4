"""What ``quantize_model`` did with each module of a model, and what its calibration found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lifequant.common.text import wrapped
from lifequant.qat.attention import QuantMultiheadAttention
from lifequant.qat.convert_functions import FunctionCalls
from lifequant.qat.input_observer import LayerInputs
from lifequant.qat.layer_inputs import TAKING, describe_inputs
from lifequant.qat.layers import TORCH_LAYERS, QuantReLU, Weighted
from lifequant.qat.refit import is_out_of_proportion
from lifequant.quantizers.base import FakeQuant

MAX_NAMES = 4  # names in a group


@dataclass
class Quantization:
    """What ``quantize_model`` did. ``calibrate`` fills in the last fields, from ``float_inputs`` on. Names are those of named_modules()."""

    swapped: dict[str, str]  # {quantized layer: "Conv2d, 4-bit weights (proxq)"}
    left: dict[str, str]  # {module that stays float: reason}
    behind_functions: list[str] = field(default_factory=list)  # layers whose input is a ReLU called as a function
    inputs: dict[str, str] = field(default_factory=dict)  # {layer: "4-bit signed input (LSQInput)"}
    images: list[str] = field(default_factory=list)  # layers that take what the model is given, which stays float
    float_inputs: list[str] = field(default_factory=list)  # layers whose input no quantizer gave, with the first layer
    shared: dict[str, int] = field(default_factory=dict)  # {ReLU that runs several times in a pass: how often}
    unreached: list[str] = field(default_factory=list)  # layers that no pass reached; their scales are not set
    errors: dict[str, float] = field(default_factory=dict)  # {layer: ||Q(x) - x|| / ||x|| of its weights or outputs}
    inaccurate: list[str] = field(default_factory=list)  # layers whose error is out of proportion to their bits

    def __str__(self) -> str:
        """A line for each group of modules, wrapped at 80 columns: how many, what, and their names."""
        uses = {name: f"runs {n} times in a pass, with one scale" for name, n in self.shared.items()}
        rows = _grouped(self.swapped)
        rows += _grouped(self.inputs)
        rows += [(f"left: {why}", names) for why, names in _grouped(self.left)]
        rows += _grouped(uses)
        rows += [("float input, behind a ReLU called as a function", self.behind_functions)]
        rows += [("float input, the model's own", self.images)]
        rows += [("float input", [n for n in self.float_inputs if n not in self.images])]
        rows += [("not reached, not calibrated", self.unreached)]
        errors = [f"{name} ({self.errors[name]:.2f})" for name in self.inaccurate]
        rows += [("relative error out of proportion to the bits", errors)]
        return "\n".join(_row(len(names), text, names) for text, names in rows if names)


def _row(count: int, text: str, names: list[str]) -> str:
    return wrapped(f"{count:>4}  {text}: {_shortened(names)}", indent=6)


def _grouped(texts: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """[(text, names that have it)]"""
    groups: dict[str, list[str]] = {}
    for name, text in texts.items():
        groups.setdefault(text, []).append(name)
    return list(groups.items())


def _shortened(names: list[str]) -> str:
    if len(names) > MAX_NAMES:
        names = [*names[: MAX_NAMES - 2], "...", names[-1]]
    return ", ".join(name or "the model itself" for name in names)


def why_float(name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> str:
    """Why a module stays float; empty if it is converted or has nothing to quantize.

    ``owners`` is {id of a parameter: names of the modules that have it}.
    """
    kind = type(module).__name__
    for base in (*TORCH_LAYERS, nn.ReLU, nn.ReLU6):
        if isinstance(module, base):
            if is_parametrized(module) or (base in TORCH_LAYERS and "weight" not in module._parameters):
                return f"{base.__name__} whose weight is parametrized"  # weight_norm, spectral_norm, pruning
            if type(module) is not base:
                return f"{kind}, a subclass of {base.__name__}"
            others = [o for p in module.parameters(recurse=False) for o in owners[id(p)] if o != name]
            return f"{kind} that shares its weight with {others[0]!r}" if others else ""
    if is_parametrized(module):
        return f"{kind.removeprefix('Parametrized')} whose {', '.join(module.parametrizations)} is parametrized"
    matrices = [parameter for parameter, p in module._parameters.items() if p is not None and p.dim() > 1]
    if matrices and not isinstance(module, ParametrizationList):
        return f"{kind}, its {', '.join(matrices[:2])}"
    return f"{kind}, an activation" if type(module).__module__ == "torch.nn.modules.activation" else ""


def why_no_scale(weight: Tensor, per_channel: bool) -> str:
    """Why no scale suits a weight; empty if one does."""
    if weight.is_meta or not weight.numel():
        return ""
    if per_channel and weight[0].numel() == 1:
        return "one weight for each scale"
    return "its weights are all alike" if bool((weight == weight.flatten()[0]).all()) else ""


def describe(q: nn.Module, stays_float: Mapping[str, str], calls: FunctionCalls, images: list[str]) -> Quantization:
    """The report of a quantized model; ``stays_float`` is {module: reason}."""
    found = Quantization({}, dict(stays_float), inputs=describe_inputs(q), images=images)
    for name, count in calls.callers.items():
        times = f" {count} times" if count > 1 else ""
        found.left.setdefault(name, f"{type(q.get_submodule(name)).__name__}, calls ReLU as a function{times}")
    found.behind_functions = [n for n, m in q.named_modules() if n in calls.behind and _has_weights(m)]
    for name, module in q.named_modules():
        if isinstance(module, Weighted):
            quant, quantity = module.weight_quant, "weights"
        elif isinstance(module, QuantReLU):
            quant, quantity = module.act_quant, "outputs"
        elif isinstance(module, QuantMultiheadAttention):
            quants = [quant for quant, _ in module.projections()]
            quant, quantity = next((quant for quant in quants if isinstance(quant, FakeQuant)), quants[0]), "weights"
        else:
            continue
        kind = type(module).__name__.removeprefix("Quant") + ("6" if getattr(module, "bound", None) else "")
        if not isinstance(quant, FakeQuant):
            found.left.setdefault(name, f"{kind}, 32 bits")
        else:
            beyond = ", more values than its bits allow" if quant.exceeds_bits else ""
            found.swapped[name] = f"{kind}, {quant.bits}-bit {quantity} ({type(quant).__name__}{beyond})"
    return found


def _has_weights(module: nn.Module) -> bool:
    return isinstance(module, Weighted)


def _takes(module: nn.Module) -> bool:
    return isinstance(module, TAKING)


def warn_of_functions(q: nn.Module, calls: FunctionCalls) -> None:
    """Warn of layers whose input stays float because the model calls ReLU as a function."""
    report: Quantization = q.quantization
    if not report.behind_functions:
        return
    callers = list(dict.fromkeys(report.left[name].split(",")[0] for name in calls.callers))
    warnings.warn(
        f"quantize_model: ReLU is called as a function (F.relu, torch.relu or x.relu()) in {_shortened(callers)}, where no "
        f"quantizer can be put: the inputs of {len(report.behind_functions)} of {sum(map(_has_weights, q.modules()))} layers with weights stay float "
        f"({_shortened(report.behind_functions)}). Make an nn.ReLU() in __init__ for each place, call it there, and quantize "
        "again",
        stacklevel=3,
    )


def _replaced(q: nn.Module, report: Quantization) -> list[str]:
    """Quantized layers that others, in float, have taken the place of; the report has these as such from now on.

    What has the former layer inside has not taken its place.
    """
    modules = dict(q.named_modules())
    quantized = {
        name for name, m in modules.items() if any(isinstance(part, TAKING | QuantReLU) for part in m.modules())
    }
    found = [name for name in report.swapped if name not in quantized]
    for name in found:
        del report.swapped[name]
        if name in modules:
            report.left[name] = f"{type(modules[name]).__name__}, put in place after quantize_model"
    return [name for name in found if name in modules]


def add_findings(
    q: nn.Module,
    layers: list[str],
    inputs: LayerInputs,
    uses: Mapping[str, int],
    reached: set[str],
    errors: Mapping[str, tuple[FakeQuant, float]],
) -> None:
    """Add what a calibration found to the report of ``q``, and warn of it if it is new."""
    report: Quantization = q.quantization
    former = report.float_inputs, report.unreached, report.inaccurate
    report.errors = {name: error for name, (_, error) in errors.items()}
    report.inaccurate = [name for name in errors if is_out_of_proportion(*errors[name])]
    replaced = _replaced(q, report)
    report.inputs = describe_inputs(q)
    report.images = [name for name in layers if name in inputs.images.union(report.images)]
    report.float_inputs = [name for name in layers if name in inputs.floats]
    report.unreached = [name for name in layers if name not in reached]
    report.shared = {name: uses[name] for name in layers if uses[name] > 1}
    lines = []
    if rest := [name for name in report.float_inputs if name not in report.images]:
        of = f"{len(rest)} of {sum(map(_takes, q.modules()))}"
        lines.append(f"{of} layers have an input that no quantizer gave: {_shortened(rest)}")
    if replaced:
        lines.append(f"{len(replaced)} layers were put in place after quantize_model, in float: {_shortened(replaced)}")
    if report.unreached:
        lines.append(f"{len(report.unreached)} layers were not reached: {_shortened(report.unreached)}")
    if report.inaccurate:
        worst = max(report.inaccurate, key=report.errors.__getitem__)
        lines.append(
            f"the quantizer changes {len(report.inaccurate)} layers out of proportion to its bits, most of all {worst} "
            f"(relative error {report.errors[worst]:.2f}): per_channel=True, more bits for them (layer_bits) or another "
            "quantizer may help"
        )
    if replaced or (lines and former != (report.float_inputs, report.unreached, report.inaccurate)):
        warnings.warn("calibrate: " + "; ".join(lines) + " (q.quantization lists all)", stacklevel=5)
