"""What became of each module of a model that convert.py quantized, and what its calibration found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lifequant.qat.layers import QuantConv2d, QuantLinear, QuantReLU
from lifequant.quantizers.base import FakeQuant

SHOWN = 4  # names on a line


@dataclass
class Quantization:
    """What quantize_model did, and from ``float_inputs`` on what calibrate found; names are those of named_modules()."""

    swapped: dict[str, str]  # {layer: "Conv2d, 4-bit weights (proxq)"}
    left: dict[str, str]  # {module: why it is as it was}
    float_inputs: list[str] = field(
        default_factory=list
    )  # layers with an input that no quantizer gave, the first one's too
    shared: dict[str, int] = field(default_factory=dict)  # {ReLU that is used several times a pass: how often}
    unreached: list[str] = field(default_factory=list)  # layers that no pass reached, so that their steps are not set

    def __str__(self) -> str:
        rows = [(len(names), what, names) for what, names in _grouped(self.swapped)]
        rows += [(len(names), f"left: {why}", names) for why, names in _grouped(self.left)]
        uses = {name: f"used {n} times in a pass, one step for all" for name, n in self.shared.items()}
        rows += [(len(names), what, names) for what, names in _grouped(uses)]
        for what, names in (("float input", self.float_inputs), ("not reached, not calibrated", self.unreached)):
            rows += [(len(names), what, names)] * bool(names)
        width = max((len(what) for _, what, _ in rows), default=0)
        return "\n".join(f"{count:>4}  {what:<{width}}  {shortened(names)}" for count, what, names in rows)


def _grouped(what: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name, value in what.items():
        groups.setdefault(value, []).append(name)
    return list(groups.items())


def shortened(names: list[str]) -> str:
    if len(names) > SHOWN:
        names = [*names[: SHOWN - 2], "...", names[-1]]
    return ", ".join(name or "the model itself" for name in names)


def why_left(name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> str:
    """Why a module stays float; empty for one that is swapped, and where there is nothing to quantize."""
    kind = type(module).__name__
    for base in (nn.Conv2d, nn.Linear, nn.ReLU, nn.ReLU6):
        if isinstance(module, base):
            if is_parametrized(module) or (base in (nn.Conv2d, nn.Linear) and "weight" not in module._parameters):
                return f"{base.__name__} whose weight is parametrized"  # weight_norm, spectral_norm, pruning
            if type(module) is not base:
                return f"{kind}, a subclass of {base.__name__}"
            others = [o for p in module.parameters(recurse=False) for o in owners[id(p)] if o != name]
            return f"{kind} that shares its weight with {others[0]!r}" if others else ""
    matrices = [parameter for parameter, p in module._parameters.items() if p is not None and p.dim() > 1]
    if matrices and not isinstance(module, ParametrizationList):
        return f"{kind}, its {', '.join(matrices[:2])}"
    return f"{kind}, an activation" if type(module).__module__ == "torch.nn.modules.activation" else ""


def report(q: nn.Module, left: Mapping[str, str]) -> Quantization:
    """The report of a quantized model; ``left`` has what stays as it was."""
    found = Quantization({}, dict(left))
    for name, module in q.named_modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            quant, what = module.weight_quant, "weights"
        elif isinstance(module, QuantReLU):
            quant, what = module.act_quant, "outputs"
        else:
            continue
        kind = type(module).__name__.removeprefix("Quant") + ("6" if getattr(module, "bound", None) else "")
        if not isinstance(quant, FakeQuant):
            found.left[name] = f"{kind}, 32 bits"
        else:
            beyond = ", more values than its bits allow" if quant.exceeds_bits else ""
            found.swapped[name] = f"{kind}, {quant.bits}-bit {what} ({type(quant).__name__}{beyond})"
    return found


def note(report: Quantization, layers: list[str], floats: set[str], uses: Mapping[str, int], reached: set[str]) -> None:
    """Keep what a calibration found in the report; say once what can't be seen otherwise."""
    said = report.float_inputs, report.unreached
    report.float_inputs = [name for name in layers if name in floats]
    report.unreached = [name for name in layers if name not in reached]
    report.shared = {name: uses[name] for name in layers if uses[name] > 1}
    lines = []
    if report.float_inputs:
        lines.append(f"{len(floats)} layers have an input that no quantizer gave: {shortened(report.float_inputs)}")
    if report.unreached:
        lines.append(f"{len(report.unreached)} layers were not reached: {shortened(report.unreached)}")
    if lines and said != (report.float_inputs, report.unreached):
        warnings.warn("calibrate: " + "; ".join(lines) + " (q.quantization names all)", stacklevel=5)
