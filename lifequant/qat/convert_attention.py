"""Convert attention in place: nn.MultiheadAttention, and that of torchvision's Swin Transformer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lifequant.qat.attention import QuantMultiheadAttention
from lifequant.qat.convert_functions import is_shifted_windows
from lifequant.qat.convert_report import why_no_scale
from lifequant.qat.layers import QuantLinear, Scheme, bits_by_name


def convert_attention(
    q: nn.Module, scheme: Scheme, stays_float: dict[str, str], layer_bits: Mapping[str, int | tuple[int, int]]
) -> list[str]:
    """Convert what can be, take it out of ``stays_float``, and return the names of the layers that are done with it.

    Weights that no scale suits stay float; ``stays_float`` names those of the projections by their parameters.
    nn.TransformerEncoder and its layers take no path of their own in eval mode, for it uses the float weights.
    """
    done = []
    for name, module in list(q.named_modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False
        if is_shifted_windows(module) and {type(module.qkv), type(module.proj)} == {nn.Linear}:
            from lifequant.qat import shifted_windows  # torchvision is there, if a model has such a module

            shifted_windows.convert_(module)
        if type(module) is nn.MultiheadAttention and not (is_parametrized(module) or is_parametrized(module.out_proj)):
            out = f"{name}.out_proj".lstrip(".")
            for converted in (name, out):
                stays_float.pop(converted, None)
            bits = bits_by_name(name, layer_bits, (scheme.weight_bits, 32))[0]
            whys = {}

            def quantizer(parameter: str, weight: Tensor, bits: int = bits, whys: dict[str, str] = whys) -> nn.Module:
                whys[parameter] = why_no_scale(weight, scheme.per_channel)
                return scheme.weight(weight.shape[0], bits=32 if whys[parameter] else bits)

            QuantMultiheadAttention.convert_(module, quantizer)
            if all(whys.values()):
                stays_float[name] = f"MultiheadAttention, {next(iter(whys.values()))}"
            else:
                stays_float |= {f"{name}.{p}".lstrip("."): f"a projection, {why}" for p, why in whys.items() if why}
            if no_scale := why_no_scale(module.out_proj.weight, scheme.per_channel):
                stays_float[out] = f"Linear, {no_scale}"
            QuantLinear.convert_(module.out_proj, scheme.weight_of(module.out_proj, bits=32 if no_scale else None))
            done += [name, out]
    return done
