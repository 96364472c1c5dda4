"""Any eager torch model, quantized: its Conv2d, Linear and ReLU become those of quantizers/layers.py, steps set from data.

>>> import torchvision
>>> from lifequant import calibrate, quantize_model
>>> q = quantize_model(torchvision.models.resnet18(), quantizer="proxq", weight_bits=4, act_bits=4)
>>> calibrate(q, loader)  # doctest: +SKIP
>>> print(q.quantization)  # doctest: +SKIP

What follows is a training loop of your own: ``q`` has the parameters that the model has, and the quantizers'.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lifequant import registry
from lifequant.common.errors import UserError
from lifequant.qat.calibration import calibrate_one, calibrate_weights, watching_activations
from lifequant.qat.convert_report import Quantization, note, report, why_left
from lifequant.qat.layers import QuantConv2d, QuantLinear, QuantReLU, Scheme, check_bits, fake_quants, set_layer_bits
from lifequant.qat.modes import preserve_state
from lifequant.quantizers.base import FakeQuant, Quantizer, sample

BATCHES = 8  # that calibrate() reads
VALUES = 2**14  # of a tensor that are held to set a step from, one call of one batch


def quantize_model(
    model: nn.Module,
    quantizer: str | Quantizer = "proxq",
    weight_bits: int = 4,
    act_bits: int = 4,
    keep_first_last: int | None = 8,
    act_quantizer: str | Quantizer | None = None,
    per_channel: bool = False,
    layer_bits: Mapping[str, int | tuple[int, int]] | None = None,
    verbose: bool = False,
) -> nn.Module:
    """A quantized copy of any eager model; the given one stays as it is.

    Every nn.Conv2d and nn.Linear gets a weight quantizer, every nn.ReLU and nn.ReLU6 one for its output. What else there
    is stays float: subclasses of these, other activations, weights that several modules share, parametrized ones.
    ``q.quantization`` (a ``Quantization``) names it all; ``verbose`` prints it.

    ``quantizer``, ``act_quantizer`` (default: the same): names, or ``registry.quantizer(name, **options)``. Bits: 2, 3, 4,
    5, 6, 8 or 32, which is float. ``keep_first_last``: bits of the weights of the first and the last Conv2d or Linear, in
    the order of modules; None for no exception. ``per_channel``: a weight step for each output channel. ``layer_bits``:
    bits by name, see ``quantizers.layers.set_layer_bits``.

    The model's float state dict loads into ``q`` strictly. Steps are set by ``calibrate``; where that wasn't called, by
    the first forward, on its batch, with a warning. In a loop of your own, ``param_groups`` and ``keep_steps_positive``
    treat steps as this package's training does; torch.compile comes after calibration. Raises UserError.
    """
    for bits, what in (
        (weight_bits, "weight_bits"),
        (act_bits, "act_bits"),
        (keep_first_last or 32, "keep_first_last"),
    ):
        check_bits(bits, f"quantize_model, {what}")
    _refuse(model)
    q = copy.deepcopy(model)
    scheme = Scheme(
        weights=_family(quantizer),
        activations=_family(act_quantizer or quantizer),
        weight_bits=weight_bits,
        act_bits=act_bits,
        first_last_bits=keep_first_last or weight_bits,
        per_channel=per_channel,
    )
    left = _swap(q, scheme)
    set_layer_bits(q, scheme, layer_bits or {})
    q.quantization = report(q, left)
    q.register_load_state_dict_post_hook(_after_loading)
    _after_loading(q)
    if verbose:
        print(q.quantization)
    return q


def _family(quantizer: str | Quantizer) -> Quantizer:
    return registry.quantizer(quantizer) if isinstance(quantizer, str) else quantizer


def _refuse(model: nn.Module) -> None:
    """Raises UserError for what can't be quantized."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise UserError(
            f"quantize_model takes an eager nn.Module, not a {type(model).__name__}: script or compile it afterwards"
        )
    for name, module in model.named_modules():
        if isinstance(module, FakeQuant | QuantConv2d | QuantLinear | QuantReLU):
            raise UserError(f"quantize_model: the model is quantized already ({name!r}): give it the float model")


def _swap(q: nn.Module, scheme: Scheme) -> dict[str, str]:
    """Turn layers, in place; returns {module that is left alone: why}."""
    modules = dict(q.named_modules())
    matrices = [name for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
    edges = {matrices[0], matrices[-1]} if matrices and scheme.first_last_bits != scheme.weight_bits else set()
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    left = {name: why for name, module in modules.items() if (why := why_left(name, module, owners))}
    swapped = 0
    for name, module in modules.items():
        if name in left:
            continue
        if isinstance(module, nn.Conv2d | nn.Linear):
            kind = QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear
            kind.convert_(module, scheme.weight(module.weight.shape[0], name in edges))
            swapped += 1
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            QuantReLU.convert_(module, scheme.activations.activation(scheme.act_bits))
            swapped += 1
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # else it computes with its layers' float weights, in eval mode
    if not swapped:
        why = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in itertools.islice(left.items(), 3))
        raise UserError(
            "quantize_model: no layer to quantize: the model has no nn.Conv2d, nn.Linear or nn.ReLU"
            + (f" but what stays float ({why})" if why else "")
        )
    return left


def calibrate(q: nn.Module, batches: Tensor | Iterable[Any], num_batches: int = BATCHES) -> None:
    """Set all steps, in place, from the weights and from the first ``num_batches`` batches, layer after layer.

    ``batches``: an iterable of inputs [N, ...], or of tuples that begin with one, as a DataLoader gives; or one tensor.
    A step is set from all that its quantizer has seen, in every call and batch (a sample of 16,384 values of each, with
    the extremes), behind quantizers that are set already. The model runs in train mode (in eval mode for one image)
    without dropout; modes, BatchNorm's statistics and the state of the random number generators stay. What it finds is
    noted in ``q.quantization``. Raises UserError for no batch and for values that are not finite.
    """
    if not isinstance(getattr(q, "quantization", None), Quantization):
        raise UserError("calibrate takes a model that quantize_model made")
    device = next((p.device for p in q.parameters()), None)
    batches = itertools.islice([batches] if torch.is_tensor(batches) else batches, num_batches)
    _unhook(q)
    count = _calibrate(q, (((_input(batch).to(device),), {}) for batch in batches))
    if not count:
        _after_loading(q)
        raise UserError("calibrate: no batch to set the steps from")


def _input(batch: Any) -> Tensor:
    x = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not torch.is_tensor(x):
        raise UserError(
            f"calibrate: a batch is a tensor, or a tuple that begins with one, not a {type(x).__name__}; a model with "
            "other inputs is calibrated by its first forward"
        )
    return x


@torch.no_grad()
def _calibrate(q: nn.Module, calls: Iterable[tuple[tuple, dict]]) -> int:
    """Calibrate on forward calls (args, kwargs); returns their number."""
    calibrate_weights(q)
    count, seen, uses = 0, {}, Counter()
    reached: set[str] = set()
    floats: set[str] = set()
    given = torch.empty(0)  # all values that quantizers gave in this pass

    def set_step(name: str, quant: FakeQuant, x: Tensor) -> None:
        if x.numel():
            seen.setdefault(name, []).append(_values(x))
            calibrate_one(quant, torch.cat(seen[name]))

    def take(name: str, x: Tensor) -> None:
        reached.add(name)
        values = sample(x[x != 0], VALUES).float()  # what pads or is silent says nothing
        if len(values):
            known = torch.isin(values, given.to(values.device)).float().mean()
            floats.update([name] * bool(known < 0.95))  # not 1, for rare values may have been missed

    def give(name: str, relu: QuantReLU, x: Tensor) -> None:
        nonlocal given
        reached.add(name)
        passes[name] += 1
        if isinstance(relu.act_quant, FakeQuant):
            given = torch.cat([given.to(x.device), sample(x, VALUES).float()]).unique()

    handles = []
    for name, module in q.named_modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, name=name: take(name, *args, *kwargs.values()), with_kwargs=True
                )
            )
        elif isinstance(module, QuantReLU):
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: give(name, m, out)))
    devices = sorted({p.device.index for p in q.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices), watching_activations(q, set_step):
            for args, kwargs in calls:
                passes, given = Counter(), given[:0]
                alone = bool(args) and torch.is_tensor(args[0]) and args[0].shape[:1] == (1,)  # BatchNorm needs two
                with preserve_state(q, train=not alone):
                    q(*args, **kwargs)
                uses |= passes
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if count:
        layers = [name for name, m in q.named_modules() if isinstance(m, QuantConv2d | QuantLinear | QuantReLU)]
        note(q.quantization, layers, floats, uses, reached)
    return count


def _values(x: Tensor) -> Tensor:
    """A sample of ``x``, flat float32, its extremes included; all where there are few."""
    values = sample(x, VALUES).float()
    return values if len(values) == x.numel() else torch.cat([values, x.aminmax().min[None].float(), x.amax()[None]])


def _calibrated(q: nn.Module) -> bool:
    return all(quant.calibrated or not quant.state_dict() for _, quant in fake_quants(q))


def _calibrate_first(q: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a model whose steps aren't set; removes itself."""
    _unhook(q)
    if _calibrated(q):
        return
    warnings.warn(
        "the steps of this quantized model were not set: they are now, from the batch of its first forward; "
        "lifequant.calibrate(q, batches) sets them from several",
        stacklevel=4,
    )
    try:
        _calibrate(q, [(args, kwargs)])
    except Exception:
        _after_loading(q)
        raise


def _after_loading(q: nn.Module, _: Any = None) -> None:
    """Load hook: the first forward calibrates if, and only if, steps are not set."""
    _unhook(q)
    if not _calibrated(q):
        q.register_forward_pre_hook(_calibrate_first, with_kwargs=True)


def _unhook(q: nn.Module) -> None:
    """By the function, not by a handle: a copy of the model has hooks of its own."""
    for key, hook in list(q._forward_pre_hooks.items()):
        if hook is _calibrate_first:
            del q._forward_pre_hooks[key]
            q._forward_pre_hooks_with_kwargs.pop(key, None)
