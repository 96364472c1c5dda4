"""Convert attention in place: nn.MultiheadAttention, and that of torchvision's Swin Transformer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lifequant.qat.attention import QuantMultiheadAttention
from lifequant.qat.convert_functions import is_shifted_windows
from lifequant.qat.layers import QuantLinear, Scheme, bits_by_name


def convert_attention(
    q: nn.Module, scheme: Scheme, stays_float: dict[str, str], layer_bits: Mapping[str, int | tuple[int, int]]
) -> list[str]:
    """Convert what can be, take it out of ``stays_float``, and return the names of the layers that are done with it.

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
            bits = bits_by_name(name, layer_bits, (scheme.weight_bits, 32))[0]
            QuantMultiheadAttention.convert_(module, lambda cout, bits=bits: scheme.weight(cout, bits=bits))
            QuantLinear.convert_(module.out_proj, scheme.weight(module.out_proj.weight.shape[0]))
            for converted in (name, out):
                stays_float.pop(converted, None)
            done += [name, out]
    return done
