"""Quantize any eager torch model: replace its Conv2d, Linear and ReLU by the layers of ``qat/layers.py``.

>>> import torchvision
>>> from lifequant import calibrate, quantize_model
>>> q = quantize_model(torchvision.models.resnet18(), weight_bits=4, act_bits=4)
>>> calibrate(q, loader)  # doctest: +SKIP
>>> print(q.quantization)  # doctest: +SKIP

After this, ``q`` is trained in a loop of your own. It has the model's parameters and those of the quantizers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lifequant import registry
from lifequant.common.errors import UserError
from lifequant.qat.convert_attention import convert_attention
from lifequant.qat.convert_calibration import calibrate, calibrate_at_first_forward
from lifequant.qat.convert_functions import FunctionCalls, find_function_calls, try_trace
from lifequant.qat.convert_loading import after_loading
from lifequant.qat.convert_report import describe, warn_of_functions, why_float, why_no_scale
from lifequant.qat.copying import copied
from lifequant.qat.layer_inputs import add_input_quantizers
from lifequant.qat.layers import (
    TORCH_LAYERS,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
    QuantReLU,
    Scheme,
    check_bits,
    fake_quants,
    set_layer_bits,
    to_torch_layers,
)
from lifequant.quantizers.base import FakeQuant, Quantizer

__all__ = ["calibrate", "quantize_model"]
QUANTIZED = {nn.Conv2d: QuantConv2d, nn.ConvTranspose2d: QuantConvTranspose2d, nn.Linear: QuantLinear}


def quantize_model(
    model: nn.Module,
    quantizer: str | Quantizer = "lsq",
    weight_bits: int = 4,
    act_bits: int = 4,
    first_last_bits: int | None = 8,
    act_quantizer: str | Quantizer | None = None,
    per_channel: bool = False,
    layer_bits: Mapping[str, int | tuple[int, int]] | None = None,
    inputs: str = "all",
    verbose: bool = False,
    **former: Any,
) -> nn.Module:
    """Return a quantized copy of any eager model; the given model does not change.

    Every nn.Conv2d, nn.ConvTranspose2d and nn.Linear gets a weight quantizer, as do the projections of nn.MultiheadAttention,
    and every nn.ReLU and nn.ReLU6 gets a quantizer for its output. Everything else stays float: subclasses of these layers, other
    activations, weights that several modules share, parametrized or constant weights. ``q.quantization`` (a ``Quantization``) lists
    all of it, and ``verbose`` prints the list.

    With ``inputs="all"``, an nn.Conv2d, nn.ConvTranspose2d, nn.Linear or nn.MultiheadAttention gets a quantizer of
    ``act_bits`` for its input, unless one ReLU's quantizer gave it or it is the model's own input. The quantizer has signed
    codes (lsq's; llsq and lsqplus have their own) if the input may be negative. Layers that take one tensor share it. Where
    the model can't be traced, ``calibrate`` decides which layers need one. With ``inputs="relu"`` there are no such
    quantizers, attention stays float, and a ReLU that the model calls as a function is warned of.

    ``quantizer`` and ``act_quantizer`` (by default the same) are names, or results of ``registry.quantizer(name,
    **options)``. Bit-widths are 2, 3, 4, 5, 6, 8 or 32, which means float. ``first_last_bits`` is the bit-width of the
    weights of the first and the last Conv2d, ConvTranspose2d or Linear, in the order of ``model.modules()``; None gives them
    ``weight_bits``. The former name of this argument, ``keep_first_last``, is still accepted. With ``per_channel``, a
    weight has one scale for each output channel; an nn.ConvTranspose2d's always has one. ``layer_bits`` gives bit-widths by name, see
    ``lifequant.qat.layers.set_layer_bits``.

    The model's float state dict loads into ``q`` strictly. So does the state dict of another ``q``; where that has other
    bits or another quantizer, its weights are loaded, a warning says so, and the scales are set anew. ``calibrate`` sets the scales. Without it, the first forward
    pass sets them from its batch, and warns. In a loop of your own, ``lifequant.qat.scales`` has ``param_groups`` and
    ``Scales``, which train the scales as this package does. Compile the model after calibration. Raises UserError for a
    model that can't be quantized and for wrong bit-widths, and TypeError for an unknown argument.
    """
    if former.keys() - {"keep_first_last"}:
        raise TypeError(f"quantize_model() got an unexpected keyword argument {next(iter(former))!r}")
    first_last_bits = former.get("keep_first_last", first_last_bits)
    for bits, name in (
        (weight_bits, "weight_bits"),
        (act_bits, "act_bits"),
        (first_last_bits or 32, "first_last_bits"),
    ):
        check_bits(bits, f"quantize_model, {name}")
    if inputs not in ("all", "relu"):
        raise UserError(f"quantize_model, inputs: {inputs!r} is not offered (known: 'all', 'relu')")
    _check_is_float(model)
    q = copied(model, "quantize_model")
    to_torch_layers(q)
    traced = try_trace(q) if act_bits < 32 else None
    calls = find_function_calls(q, traced) if act_bits < 32 and inputs == "relu" else FunctionCalls()
    scheme = Scheme(
        weights=_family(quantizer),
        activations=_family(act_quantizer or quantizer),
        weight_bits=weight_bits,
        act_bits=act_bits,
        first_last_bits=first_last_bits or weight_bits,
        per_channel=per_channel,
    )
    layer_bits = layer_bits or {}
    stays_float = _convert_layers(q, scheme, inputs == "all", layer_bits)
    set_layer_bits(q, scheme, layer_bits, stays_float)
    images = add_input_quantizers(q, traced, scheme, layer_bits) if inputs == "all" else []
    device = next((p.device for p in q.parameters()), None)
    for name, quant in fake_quants(q):
        quant.prepare_to_convert(of_weight=name.endswith("weight_quant"))
        quant.to(device)
    q.quantization = describe(q, stays_float, calls, images)
    q.register_load_state_dict_post_hook(after_loading)
    calibrate_at_first_forward(q)
    warn_of_functions(q, calls)
    if verbose:
        print(q.quantization)
    return q


def _family(quantizer: str | Quantizer) -> Quantizer:
    if isinstance(quantizer, int):  # quantize_model(model, 4)
        raise UserError(f"quantize_model: {quantizer} is no quantizer's name; bits are weight_bits= and act_bits=")
    return registry.quantizer(quantizer) if isinstance(quantizer, str) else quantizer


def _check_is_float(model: nn.Module) -> None:
    """Raises UserError if the model is scripted, compiled or already quantized. At 32 bits, our own layers are float."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise UserError(
            f"quantize_model takes an eager nn.Module, not a {type(model).__name__}: pass the model that this was made of; "
            "compile, export or trace it after calibration"
        )
    for name, module in model.named_modules():
        if isinstance(module, FakeQuant):
            raise UserError(f"quantize_model: the model is already quantized ({name!r}): pass the float model")


def _convert_layers(
    q: nn.Module, scheme: Scheme, inputs: bool, layer_bits: Mapping[str, int | tuple[int, int]]
) -> dict[str, str]:
    """Convert the layers in place, and return {module that stays float: reason}."""
    modules = dict(q.named_modules())
    weighted = [name for name, module in modules.items() if isinstance(module, TORCH_LAYERS)]
    first_last = {weighted[0], weighted[-1]} if weighted and scheme.first_last_bits != scheme.weight_bits else set()
    owners: dict[int, list[str]] = {}  # of each parameter, by its id
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    stays_float = {name: why for name, module in modules.items() if (why := why_float(name, module, owners))}
    done = convert_attention(q, scheme, stays_float, layer_bits) if inputs else []
    converted = len(done)
    for name, module in modules.items():
        if name in stays_float or name in done:
            continue
        if isinstance(module, TORCH_LAYERS):
            layer_type = QUANTIZED[type(module)]
            no_scale = why_no_scale(module.weight, scheme.per_channel and layer_type is not QuantConvTranspose2d)
            bits = 32 if no_scale else None
            layer_type.convert_(module, scheme.weight_of(module, name in first_last, bits))
            if no_scale:
                stays_float[name] = f"{type(module).__name__.removeprefix('Quant')}, {no_scale}"
            converted += 1
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            QuantReLU.convert_(module, scheme.activations.activation(scheme.act_bits))
            converted += 1
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # this disables its fast path in eval mode, which uses the float weights
    if not converted:
        reasons = [f"{name or 'the model itself'}: {why}" for name, why in itertools.islice(stays_float.items(), 3)]
        raise UserError(
            "quantize_model: the model has no nn.Conv2d, nn.ConvTranspose2d, nn.Linear or nn.ReLU that can be quantized"
            + (f"; these stay float: {'; '.join(reasons)}" if reasons else "")
        )
    return stays_float
