"""Calibration of a model that ``quantize_model`` made: from several batches, of any model, with a report of what it found."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lifequant.common.errors import UserError
from lifequant.qat.calibration import calibrate_quantizer, calibrate_weights, hook_activations, is_empty
from lifequant.qat.convert_inputs import WEIGHTED
from lifequant.qat.convert_report import Quantization, add_findings
from lifequant.qat.input_observer import LayerInputs, sample_with_extremes
from lifequant.qat.layer_inputs import TAKING, OpenInput
from lifequant.qat.layers import QuantReLU, fake_quants
from lifequant.qat.modes import preserve_state
from lifequant.qat.refit import refit_activation, refit_weight, relative_error
from lifequant.qat.weights import Weight, weights
from lifequant.quantizers.base import FakeQuant

NUM_BATCHES = 8  # batches that calibrate() reads


def calibrate(
    q: nn.Module,
    batches: Tensor | Iterable[Any],
    num_batches: int = NUM_BATCHES,
    *,
    train: bool | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Set all scales, in place, from the weights and from the first ``num_batches`` batches, layer after layer.

    ``batches`` is an iterable, as a DataLoader, or one tensor. Of a tuple the first element is the input (a tensor [N, ...],
    or what else the model takes, like a detector's list of images), and a dict holds keyword arguments. With ``forward``,
    ``forward(q, batch)`` runs the model on a batch as it comes from ``batches``: a model with two inputs needs it.

    Each scale is set from everything that its quantizer received in all batches so far (a sample of 16,384
    values of each tensor, which includes the minimum and the maximum). Layers in front of it are quantized already. The
    model runs without dropout, in the mode that it is in; ``train`` gives it another mode. A model in train mode runs a batch
    of one image in eval mode, since BatchNorm needs two values. Its modes, buffers and the state of torch's random number
    generators do not change. ``q.quantization`` lists what the calibration found: a warning names the layers whose values the
    quantizer changes out of proportion to its bits (qat/refit.py). Raises UserError if there is no batch or if a value is
    not finite; the scales are the former ones then, as after any error.
    """
    q = getattr(q, "_orig_mod", q)  # of torch.compile
    if not isinstance(getattr(q, "quantization", None), Quantization):
        raise UserError("calibrate takes a model that quantize_model made")
    device = next((p.device for p in q.parameters()), None)
    batches = itertools.islice([batches] if torch.is_tensor(batches) else batches, num_batches)
    calls = (((batch,), {}) for batch in batches) if forward else (_call(batch, device) for batch in batches)
    calls = (call for call in calls if not is_empty(*call))
    _remove_hook(q)
    try:
        _calibrate_on_calls(q, calls, train, forward)
    finally:
        calibrate_at_first_forward(q)


def _call(batch: Any, device: torch.device | None) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a forward call."""
    if isinstance(batch, Mapping):
        return (), _to(batch, device)
    x = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not isinstance(x, Tensor | list | tuple | Mapping):
        raise UserError(
            f"calibrate: a batch must be a tensor, a tuple that begins with the input, or a dict of keyword arguments, not a "
            f"{type(x).__name__}: forward=lambda q, batch: q(...) says how the model takes it"
        )
    return (_to(x, device),), {}


def _to(value: Any, device: torch.device | None) -> Any:
    """``value`` with the tensors in it on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to(v, device) for name, v in value.items()}
    return type(value)(_to(v, device) for v in value) if type(value) in (list, tuple) else value


@contextmanager
def _whole_or_not_at_all(q: nn.Module) -> Iterator[None]:
    """After an error inside, all quantizers are as they were."""
    quants = [m for m in q.modules() if isinstance(m, FakeQuant | OpenInput)]
    former = [({n: p.detach().clone() for n, p in quant._parameters.items()}, _copies(quant)) for quant in quants]
    flags = [getattr(quant, "_calibrated", False) for quant in quants]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for quant, (parameters, buffers), flag in zip(quants, former, flags, strict=True):
                for name, value in parameters.items():
                    quant._parameters[name].copy_(value)
                quant._buffers.update(buffers)
                quant._calibrated = flag
        raise


def _copies(quant: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if b is None else b.clone() for name, b in quant._buffers.items()}


@torch.no_grad()
def _calibrate_on_calls(
    q: nn.Module,
    calls: Iterable[tuple[tuple, dict]],
    train: bool | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Calibrate with forward calls (args, kwargs). Raises UserError if there is none."""
    with _whole_or_not_at_all(q):
        observer, count = _observed(q, calls, train, forward)
        if not count:
            raise UserError("calibrate: there is no batch to set the scales from")
    layers = [name for name, m in q.named_modules() if isinstance(m, QuantReLU | TAKING)]
    add_findings(q, layers, observer.layer_inputs, observer.uses, observer.reached, _errors(q, observer))


def _weights(q: nn.Module) -> list[Weight]:
    """All weights that are quantized."""
    return [weight for weight in weights(q) if isinstance(weight.quant, FakeQuant)]


def _errors(q: nn.Module, observer: _Observer) -> dict[str, tuple[FakeQuant, float]]:
    """{tensor: (quantizer, relative error)}; "layer1" is a layer's weights or a ReLU's outputs, "layer1, input" its input."""
    quantized, found = {id(weight.quant): weight.tensor for weight in _weights(q)}, {}
    for name, quant in fake_quants(q):
        layer, _, place = name.removesuffix(".quant").rpartition(".")
        if id(quant) in quantized:
            found[layer] = quant, relative_error(quant, quantized[id(quant)])
        elif name in observer.inputs:
            of_relu = isinstance(q.get_submodule(layer), QuantReLU)
            text = layer if of_relu else f"{layer}, {place.replace('act_quant', 'input').removesuffix('_quant')}"
            found[text] = quant, relative_error(quant, torch.cat(observer.inputs[name]))
    return found


def _observed(
    q: nn.Module,
    calls: Iterable[tuple[tuple, dict]],
    train: bool | None,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> tuple[_Observer, int]:
    """What the forward calls show, and how many there were. The scales are set meanwhile."""
    calibrate_weights(q)
    for weight in _weights(q):
        refit_weight(weight.quant, weight.tensor)
    observer = _Observer()
    count = 0
    devices = sorted({p.device.index for p in q.parameters() if p.is_cuda})
    handles = observer.register(q)
    try:
        with torch.random.fork_rng(devices=devices), hook_activations(q, observer.set_scale):
            for args, kwargs in calls:
                observer.begin_pass(args, kwargs)
                mode = False if train is None and _is_one_image(*args, *kwargs.values()) else train
                with preserve_state(q, mode):
                    forward(q, *args) if forward else q(*args, **kwargs)
                observer.end_pass()
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    observer.layer_inputs.finish(q)
    return observer, count


def _is_one_image(first: Any = None, *_: Any) -> bool:
    return torch.is_tensor(first) and first.shape[:1] == (1,)


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
            elif isinstance(module, WEIGHTED):  # stays float, as nn.Embedding
                handles.append(module.register_forward_hook(lambda *_, name=name: self.layer_inputs.begin_with(name)))
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
            values = torch.cat(self.inputs[name])
            calibrate_quantizer(quant, values)
            refit_activation(quant, values)

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


def is_to_calibrate(q: nn.Module) -> bool:
    """Whether the first forward pass will calibrate the model."""
    return any(hook is _calibrate_first for hook in q._forward_pre_hooks.values())


def calibrate_at_first_forward(q: nn.Module) -> None:
    """Let the first forward pass calibrate the model if any scale is not set."""
    _remove_hook(q)
    if not _is_calibrated(q):
        q.register_forward_pre_hook(_calibrate_first, with_kwargs=True)


def _calibrate_first(q: nn.Module, args: tuple, kwargs: dict) -> None:
    """The forward pre-hook of a model whose scales are not set. It removes itself."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # where no flag on a device can be read
        raise UserError(
            "the scales of this model are not set: calibrate(q, batches), or run it once, before it is exported or traced"
        )
    now = torch.compiler.disable(_calibrate_now) if torch.compiler.is_compiling() else _calibrate_now
    now(q, args, kwargs)


def _calibrate_now(q: nn.Module, args: tuple, kwargs: dict) -> None:
    _remove_hook(q)
    if _is_calibrated(q):
        return
    if is_empty(args, kwargs):
        calibrate_at_first_forward(q)  # nothing to set scales from
        return
    warnings.warn(
        "the scales of this quantized model were not set; its first forward pass sets them now, from one batch; "
        "lifequant.calibrate(q, batches) sets them from several",
        stacklevel=5,
    )
    try:
        _calibrate_on_calls(q, [(args, kwargs)])
        _share_scales(q)
    finally:
        calibrate_at_first_forward(q)


@torch.no_grad()
def _share_scales(q: nn.Module) -> None:
    """Give all processes the scales of the first, which has other data than they have."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for quant in (m for m in q.modules() if isinstance(m, FakeQuant | OpenInput)):
        for value in (*quant.parameters(recurse=False), *quant.buffers(recurse=False)):
            dist.broadcast(value.data, 0)


def _remove_hook(q: nn.Module) -> None:
    """Remove the hook by its function, because a copy of the model has no handle of its own."""
    for key, hook in list(q._forward_pre_hooks.items()):
        if hook is _calibrate_first:
            del q._forward_pre_hooks[key]
            q._forward_pre_hooks_with_kwargs.pop(key, None)
