"""Calibration of a model that ``quantize_model`` made: from several batches, of any model, with a report of what it found."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lifequant.common.errors import UserError
from lifequant.qat.calibration import calibrate_quantizer, calibrate_weights, hook_activations
from lifequant.qat.convert_report import Quantization, add_findings
from lifequant.qat.input_observer import LayerInputs, sample_with_extremes
from lifequant.qat.layer_inputs import TAKING
from lifequant.qat.layers import QuantReLU, fake_quants
from lifequant.qat.modes import preserve_state
from lifequant.quantizers.base import FakeQuant

NUM_BATCHES = 8  # batches that calibrate() reads


def calibrate(q: nn.Module, batches: Tensor | Iterable[Any], num_batches: int = NUM_BATCHES) -> None:
    """Set all scales, in place, from the weights and from the first ``num_batches`` batches, layer after layer.

    ``batches`` is an iterable of inputs [N, ...] or of tuples that begin with an input, as a DataLoader gives them, or it
    is one tensor. Each scale is set from everything that its quantizer received in all batches so far (a sample of 16,384
    values of each tensor, which includes the minimum and the maximum). Layers in front of it are quantized already. The
    model runs in train mode (in eval mode for a batch of one image), without dropout. Its modes, BatchNorm's statistics
    and the state of the random number generators do not change. ``q.quantization`` lists what the calibration found.
    Raises UserError if there is no batch or if a value is not finite.
    """
    if not isinstance(getattr(q, "quantization", None), Quantization):
        raise UserError("calibrate takes a model that quantize_model made")
    device = next((p.device for p in q.parameters()), None)
    batches = itertools.islice([batches] if torch.is_tensor(batches) else batches, num_batches)
    _remove_hook(q)
    if not _calibrate_on_calls(q, (((_input(batch).to(device),), {}) for batch in batches)):
        calibrate_at_first_forward(q)
        raise UserError("calibrate: there is no batch to set the scales from")


def _input(batch: Any) -> Tensor:
    x = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not torch.is_tensor(x):
        raise UserError(
            f"calibrate: a batch must be a tensor, or a tuple that begins with a tensor, not a {type(x).__name__}; for a "
            "model with other inputs, leave out calibrate: its first forward pass calibrates it"
        )
    return x


@torch.no_grad()
def _calibrate_on_calls(q: nn.Module, calls: Iterable[tuple[tuple, dict]]) -> int:
    """Calibrate with forward calls (args, kwargs), and return how many there were."""
    calibrate_weights(q)
    observer = _Observer()
    count = 0
    devices = sorted({p.device.index for p in q.parameters() if p.is_cuda})
    handles = observer.register(q)
    try:
        with torch.random.fork_rng(devices=devices), hook_activations(q, observer.set_scale):
            for args, kwargs in calls:
                observer.begin_pass(args, kwargs)
                one_image = bool(args) and torch.is_tensor(args[0]) and args[0].shape[:1] == (1,)
                with preserve_state(q, train=not one_image):  # BatchNorm needs two values of a channel in train mode
                    q(*args, **kwargs)
                observer.end_pass()
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if count:
        observer.layer_inputs.finish(q)
        layers = [name for name, m in q.named_modules() if isinstance(m, QuantReLU | TAKING)]
        add_findings(q, layers, observer.layer_inputs, observer.uses, observer.reached)
    return count


class _Observer:
    """Sets scales during forward passes, and records which layers run, how often, and on which inputs."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}  # samples of each quantizer's inputs
        self.reached: set[str] = set()
        self.layer_inputs = LayerInputs()
        self.uses: Counter[str] = Counter()  # the most uses of a ReLU in one pass
        self.uses_in_pass: Counter[str] = Counter()

    def register(self, q: nn.Module) -> list[Any]:
        """Add the hooks to all layers, and return their handles."""
        handles = []
        self.layer_inputs.begin(q)
        for name, module in q.named_modules():
            if isinstance(module, TAKING):
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, args, kwargs, name=name: self.see_input(name, m, args, kwargs), with_kwargs=True
                    )
                )
            elif isinstance(module, QuantReLU):
                handles.append(
                    module.register_forward_hook(lambda m, args, out, name=name: self.see_output(name, m, out))
                )
        return handles

    def begin_pass(self, args: tuple, kwargs: dict) -> None:
        self.uses_in_pass = Counter()
        self.layer_inputs.begin_pass(args, kwargs)

    def end_pass(self) -> None:
        self.uses |= self.uses_in_pass
        self.layer_inputs.end_pass()

    def set_scale(self, name: str, quant: FakeQuant, x: Tensor) -> None:
        """Before an activation quantizer runs: set its scale from all of its inputs so far."""
        if x.numel():
            self.inputs.setdefault(name, []).append(sample_with_extremes(x))
            calibrate_quantizer(quant, torch.cat(self.inputs[name]))

    def see_input(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a layer runs: find out whether its input is quantized."""
        self.reached.add(name)
        self.layer_inputs.see(name, layer, args, kwargs)

    def see_output(self, name: str, relu: QuantReLU, x: Tensor) -> None:
        """After a ReLU ran: count the use and keep the values that it gave."""
        self.reached.add(name)
        self.uses_in_pass[name] += 1
        if isinstance(relu.act_quant, FakeQuant):
            self.layer_inputs.keep(name, x)


def _is_calibrated(q: nn.Module) -> bool:
    return all(quant.calibrated or not quant.state_dict() for _, quant in fake_quants(q))


def calibrate_at_first_forward(q: nn.Module, _: Any = None) -> None:
    """Let the first forward pass calibrate the model if any scale is not set. It is also a hook after loading a state dict."""
    _remove_hook(q)
    if not _is_calibrated(q):
        q.register_forward_pre_hook(_calibrate_first, with_kwargs=True)


def _calibrate_first(q: nn.Module, args: tuple, kwargs: dict) -> None:
    """The forward pre-hook of a model whose scales are not set. It removes itself."""
    _remove_hook(q)
    if _is_calibrated(q):
        return
    warnings.warn(
        "the scales of this quantized model were not set; its first forward pass sets them now, from one batch; "
        "lifequant.calibrate(q, batches) sets them from several",
        stacklevel=4,
    )
    try:
        _calibrate_on_calls(q, [(args, kwargs)])
    except Exception:
        calibrate_at_first_forward(q)
        raise


def _remove_hook(q: nn.Module) -> None:
    """Remove the hook by its function, because a copy of the model has no handle of its own."""
    for key, hook in list(q._forward_pre_hooks.items()):
        if hook is _calibrate_first:
            del q._forward_pre_hooks[key]
            q._forward_pre_hooks_with_kwargs.pop(key, None)
