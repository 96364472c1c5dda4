"""Put quantizers before the layers whose input no ReLU's quantizer gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant.qat.attention import QuantMultiheadAttention
from lifequant.qat.convert_functions import Trace, is_shifted_windows
from lifequant.qat.convert_inputs import Input, Inputs
from lifequant.qat.layers import QuantReLU, Scheme, Weighted, bits_by_name
from lifequant.quantizers.base import FakeQuant
from lifequant.quantizers.inputs import input_quantizer


class OpenInput(nn.Module):
    """The quantizer of an input that the trace of the model does not show. Calibration decides whether it is needed.

    ``skips`` is a buffer, so that every copy of the model's state has the decision. No branch reads it.
    """

    idle = False  # whether the last calibration found that no tensor goes through it

    def __init__(self, quant: nn.Module, may_be_image: bool = True) -> None:
        super().__init__()
        self.quant, self.may_be_image = quant, may_be_image
        self.register_buffer("skips", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.skips, x, self.quant(x))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: object) -> None:
        if prefix + "skips" in state_dict:  # a float model's state has none
            super()._load_from_state_dict(state_dict, prefix, *rest)


TAKING = Weighted | QuantMultiheadAttention


def places(module: nn.Module) -> list[tuple[str, int, str]]:
    """(quantizer, argument, its keyword) of each tensor that a layer takes."""
    if isinstance(module, QuantMultiheadAttention):
        return [("act_quant", 0, "query"), ("key_quant", 1, "key"), ("value_quant", 2, "value")]
    return [("act_quant", 0, "input")]


def input_quantizers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(layer, which quantizer, quantizer) of all layers that have one for an input."""
    for name, module in model.named_modules():
        if isinstance(module, TAKING):
            for place, *_ in places(module):
                if isinstance(quant := getattr(module, place, None), FakeQuant | OpenInput):
                    yield name, place, quant


def add_input_quantizers(
    q: nn.Module, trace: Trace | None, scheme: Scheme, layer_bits: Mapping[str, int | tuple[int, int]]
) -> list[str]:
    """Give the layers of ``q`` quantizers for their inputs, in place, and return the layers that take the model's own input.

    Layers that the trace shows to take one tensor share one quantizer, if they have the same bits.
    """
    modules = dict(q.named_modules())
    relus = {name for name, m in modules.items() if isinstance(m, QuantReLU) and isinstance(m.act_quant, FakeQuant)}
    inputs = trace and Inputs(trace, relus)
    shared: dict[object, nn.Module] = {}
    images = []
    for name, module in modules.items():
        if not isinstance(module, TAKING):
            continue
        bits = bits_by_name(name, layer_bits, (scheme.weight_bits, scheme.act_bits))[1]
        for place, argument, keyword in places(module):
            found = _found(modules, inputs, name, argument, keyword)
            if found is not None and found.quantized:
                images += [name] if found.image and name not in images else []
                continue
            if bits == 32:
                continue
            key: object = (name, keyword == "query")  # keys and values are of one tensor, the memory
            if found is not None:
                key = (found.nodes or (name, keyword), found.signed, bits)  # the layers of one tensor
            if key not in shared:
                quant = input_quantizer(scheme.activations, bits, found is None or found.signed)
                shared[key] = OpenInput(quant, _may_be_image(inputs, name)) if found is None else quant
            setattr(module, place, shared[key])
    device = next((p.device for p in q.parameters()), None)
    for quant in shared.values():
        quant.to(device)
    return images


def _found(
    modules: dict[str, nn.Module], inputs: Inputs | None, name: str, argument: int, keyword: str
) -> Input | None:
    """What a layer takes, if it is known."""
    parent, _, last = name.rpartition(".")
    around = modules[parent] if name else None
    if isinstance(around, QuantMultiheadAttention) and last == "out_proj":
        return Input(quantized=False, image=False)
    if is_shifted_windows(around) and last == "proj":
        return Input(quantized=False, image=False)
    if isinstance(around, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        if last == "self_attn" and keyword != "query":
            return Input(quantized=True, image=False)  # by the query's quantizer, for all three are one tensor
        if last == "linear1":
            return Input(quantized=False, image=False)
        if last == "linear2" and not isinstance(around.activation, nn.Module):
            return Input(quantized=False, image=False, signed=around.activation not in (F.relu, torch.relu))
    if inputs is None:
        return None
    if is_shifted_windows(around) and last == "qkv":
        return inputs.of(parent, 0, "x")
    return inputs.of(name, argument, keyword)


def _may_be_image(inputs: Inputs | None, name: str) -> bool:
    """Whether a layer that the trace does not show may take what the model is given, as far as the trace shows."""
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts))]
    seen = [found for outer in around if inputs is not None and (found := inputs.of(outer, 0, "src"))]
    return not seen or seen[0].image


def describe_inputs(q: nn.Module) -> dict[str, str]:
    """{layer: "4-bit signed input (LSQInput)"}"""
    found = list(input_quantizers(q))
    takers: dict[int, set[str]] = {}
    for name, _, quant in found:
        takers.setdefault(id(quant), set()).add(name)
    rows: dict[str, str] = {}
    for name, _, quant in found:
        inner = quant.quant if isinstance(quant, OpenInput) else quant
        text = f"{inner.bits}-bit {'signed ' if inner.qn < 0 else ''}input ({type(inner).__name__})"
        if isinstance(quant, OpenInput) and not inner.calibrated:
            text += " if calibration finds that it needs one"
        elif isinstance(quant, OpenInput) and bool(quant.skips):
            continue
        text += ", shared" if len(takers[id(quant)]) > 1 else ""
        rows.setdefault(name, text)
    return rows
