"""What follows when a state dict was loaded into a model that ``quantize_model`` made."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn

from lifequant.qat.calibration import calibrate_quantizer
from lifequant.qat.convert_calibration import calibrate_at_first_forward, is_to_calibrate
from lifequant.qat.layers import QuantConvTranspose2d, fake_quants
from lifequant.qat.refit import refit_weight


def after_loading(q: nn.Module, _: Any = None) -> None:
    """The hook after loading a state dict: warns where that is of other quantizers, whose scales were not taken over."""
    _set_transposed(q)
    before = is_to_calibrate(q)
    calibrate_at_first_forward(q)
    if is_to_calibrate(q) and not before and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what was compiled of a calibrated model would pass over the hook that is there now
    unlike = {name: quant for name, quant in fake_quants(q) if quant.unlike}
    if unlike:
        name, quant = next(iter(unlike.items()))
        warnings.warn(
            f"load_state_dict: {len(unlike)} quantizers of the state are of another kind than the model's ({name}: "
            f"{quant.unlike}, here {quant.kind}): the weights are loaded, and the scales are set anew by lifequant.calibrate, or "
            "by the first forward pass",
            stacklevel=4,
        )


@torch.no_grad()
def _set_transposed(q: nn.Module) -> None:
    """Set the scales of transposed convolutions' weights where all others are set: a former version had none of these."""
    unset = {id(quant) for _, quant in fake_quants(q) if quant.state_dict() and not quant.calibrated}
    new = [m for m in q.modules() if isinstance(m, QuantConvTranspose2d) and id(m.weight_quant) in unset]
    if not new or len(new) < len(unset) or any(m.weight.is_meta or not m.weight.isfinite().all() for m in new):
        return
    for module in new:
        calibrate_quantizer(module.weight_quant, module.weight)
        refit_weight(module.weight_quant, module.weight)
    warnings.warn(
        f"load_state_dict: the state has no scale for the weights of {len(new)} ConvTranspose2d, which a former version left "
        "in float: they are set from the weights",
        stacklevel=5,
    )
