"""What a quantizer is.

A Quantizer is a family ("lsq"): it makes the fake-quantizers of one network, one module a tensor. A FakeQuant maps a
float tensor to one of at most 2^bits values and lets the gradient through by the straight-through estimator:

    u = to_codes(x);  q = round(clamp(u, qn, qp));  x_q = dequantize(q, x)

Only plain operations and no branch on data, so that torch.compile takes a whole network in one graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lifequant.common.errors import UserError

STEP_FLOOR = 1e-6  # a step below it is a failure of the run, which reports it; without it a negative step flips signs
BIT_WIDTHS = (2, 3, 4, 5, 6, 8, 32)
HALF = (torch.float16, torch.bfloat16)


def round_ste(u: Tensor) -> Tensor:
    """Round to nearest (ties to even), gradient of the identity. Exact: u + (round(u) - u) has no rounding error."""
    return u + (u.round() - u).detach()


def positive(parameter: Tensor) -> Tensor:
    """A learned scale as it is, with its gradient, and STEP_FLOOR where an optimizer took it below: the gradient there is
    the scale's own, so that it comes back. NaN stays NaN."""
    return torch.where(parameter > STEP_FLOOR, parameter, STEP_FLOOR + (parameter - parameter.detach()))


def scale_gradient(parameter: Tensor, factor: float) -> Tensor:
    """The parameter's value, bit for bit, with its gradient times ``factor`` (LSQ, Esser et al. 2020, sec. 2.2)."""
    scaled = parameter * factor
    return parameter.detach() + (scaled - scaled.detach())


def standardize(x: Tensor, channels: int | None) -> tuple[Tensor, Tensor]:
    """(x - mean, population standard deviation), differentiable; over the tensor, or over each output channel.

    The deviation is at least STEP_FLOOR, so a constant tensor gives 0; bounded before the root, whose gradient at 0 is
    infinite. A power of two changes no digit and keeps the squares of huge values finite.
    """
    scale = 2.0**-40
    dims = None if channels is None else tuple(range(1, x.dim()))
    centered = x - x.mean(dims, keepdim=channels is not None)
    variance = (centered * scale).square().mean(dims, keepdim=channels is not None)
    return centered, variance.clamp((STEP_FLOOR * scale) ** 2, torch.finfo(x.dtype).max).sqrt() / scale


class FakeQuant(nn.Module):
    """Base of all fake-quantizers: clamp to [qn, qp], round, both skipped while ``rounding`` is False.

    A weight's step may be one for each output channel (the first dimension of the weight): ``channels`` is their number,
    None for one step for the tensor. Parameters then have the shape [channels]; ``broadcast_channels`` makes them fit the weight.
    """

    before_relu = False  # an activation quantizer that takes what the ReLU would, and is followed by it
    exceeds_bits = False  # gives more than 2^bits values; every report says so
    linear = False  # x_q is step() times the code, bit for bit, whatever else x holds
    keeps_range = True  # x_q is near x, whatever mean and scale x has
    straight_to: float | None = None  # of a weight's: where |x| is at most this, x_q is nearly linear in x
    of_codes: tuple[str, ...] = ()  # names of parameters that say which code x has, and not what a code stands for
    weight_decay = False  # whether the optimizer decays its parameters, as PACT's L2 on the clipping level does
    tables: tuple[str, ...] = ()  # buffers that have no entry for each channel
    unlike: str | None = None  # the kind of a state that was not taken over, since it is of another

    def __init__(self, bits: int, qn: int, qp: int) -> None:
        super().__init__()
        self.bits, self.qn, self.qp = bits, qn, qp
        self.rounding = True
        self._calibrated = False
        for name in ("is_set", "input_scale", "output_gain", "output_offset"):  # see ``prepare_to_convert``
            self.register_buffer(name, None)

    @property
    def calibrated(self) -> bool:
        """Whether the step was set from data, or loaded."""
        return self._calibrated if self.is_set is None or self.is_set.is_meta else bool(self.is_set)

    @calibrated.setter
    def calibrated(self, value: bool) -> None:
        self._calibrated = value
        if self.is_set is not None:
            self.is_set.fill_(value)

    @property
    def kind(self) -> str:
        """Type and bit-width, as a state dict has them."""
        return f"{type(self).__name__}, {self.bits} bits"

    def prepare_to_convert(self, of_weight: bool) -> None:
        """For a network that exists (``quantize_model``). The state dict says of what kind the quantizer is and whether its
        step is set, and a copy of all parameters and buffers, by whatever way, is the same quantizer. Scalars become [1], which
        sharding asks for. What has another range than its input gets one that qat/refit.py sets."""
        for name, p in self._parameters.items():
            if p.dim() == 0:
                self._parameters[name] = nn.Parameter(p.detach().view(1), p.requires_grad)
        for name, b in self._buffers.items():
            self._buffers[name] = b.view(1) if b is not None and b.dim() == 0 else b
        if not self.keeps_range and of_weight:
            self.output_gain, self.output_offset = torch.ones(self.channels or 1), torch.zeros(self.channels or 1)
            self.input_scale = None if self.straight_to is None else torch.ones(self.channels or 1)
        elif not self.keeps_range:
            self.input_scale = torch.ones(1)
        self.is_set = torch.tensor(self._calibrated)

    def to_codes(self, x: Tensor) -> Tensor:
        """Float tensor -> real-valued codes, before clamp and round."""
        raise NotImplementedError

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        """Codes of ``x`` -> the values that the network computes with."""
        raise NotImplementedError

    def inverse(self, u: Tensor, x: Tensor) -> Tensor:
        """The inverse of ``to_codes``, with the statistics of ``x`` where it uses any."""
        return self.dequantize(u, x)

    def scale(self) -> Tensor:
        """The distance of two neighboring values, a scalar, or one for each channel [C]."""
        raise NotImplementedError

    def step(self) -> Tensor:
        """The same as ``scale``."""
        return self.scale()

    def calibrate(self, x: Tensor) -> None:
        """Set the scale from data, in place, so that an optimizer that was made before keeps its parameter.

        Raises UserError where ``x`` is not finite (``refuse_non_finite``).
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``quantize(x)`` in the dtype of ``x``, computed in float32 where that is a half type: dividing in bfloat16 changes
        3 % of 4-bit codes and 23 % of 8-bit ones, and a small step is 0 in float16."""
        value = self.quantize(self.scaled_input(x))
        if self.output_gain is not None:
            value = value * self.broadcast_channels(self.output_gain, x) + self.broadcast_channels(
                self.output_offset, x
            )
        elif self.input_scale is not None:
            value = value * self.input_scale
        return value.to(x.dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """Float tensor -> the values that the network computes with, same shape."""
        u = self.to_codes(x)
        if self.rounding:
            u = round_ste(u.clamp(self.qn, self.qp))
        return self.dequantize(u, x)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """int16 codes of ``x``, same shape."""
        return self.to_codes(self.scaled_input(x)).clamp(self.qn, self.qp).round().to(torch.int16)

    def scaled_input(self, x: Tensor) -> Tensor:
        """What ``to_codes`` is given of an input ``x``: in float32 at least, over ``input_scale`` where there is one."""
        x = x.float() if x.dtype in HALF else x
        return x if self.input_scale is None else x / self.broadcast_channels(self.input_scale, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuant:
        """What moves or casts a module: the quantizer's own numbers stay in float32 where the module becomes a half type."""

        def at_least_float32(t: Tensor) -> Tensor:
            found = fn(t)
            return t.to(found.device) if found.dtype in HALF and t.dtype not in HALF else found

        return super()._apply(at_least_float32, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A float network's state dict loads strictly: a quantizer that it knows nothing of stays uncalibrated."""
        own = {prefix + name for name in self.state_dict()}
        kind = state_dict.pop(prefix + "kind", None)
        self.unlike = None if kind is None or (kind := bytes(kind.tolist()).decode()) == self.kind else kind
        if self.unlike or (own and own.isdisjoint(state_dict)):
            self.calibrated = False
            return
        own.discard(prefix + "kind")
        if self.is_set is not None:
            state_dict.setdefault(prefix + "is_set", torch.tensor(True))  # a former version's, as what follows
            if self.straight_to is not None:
                state_dict.setdefault(prefix + "input_scale", torch.ones_like(self.input_scale))
            for name, p in self._parameters.items():
                if (value := state_dict.get(prefix + name)) is not None and value.numel() == p.numel():
                    state_dict[prefix + name] = value.view(p.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.is_set is None:
            self.calibrated = own <= state_dict.keys()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_set is not None:
            destination[prefix + "kind"] = torch.tensor(list(self.kind.encode()), dtype=torch.uint8)

    def __prepare_scriptable__(self) -> FakeQuant:
        """What torch.jit.script asks every module for."""
        raise UserError("TorchScript takes no quantized model: use torch.export or torch.jit.trace, after calibration")

    def scale_parameters(self) -> list[nn.Parameter]:
        """Parameters that must stay positive. They take no weight decay, like all parameters of a quantizer."""
        return [p for p in self.parameters(recurse=False) if p.requires_grad]

    def refuse_non_finite(self, x: Tensor) -> None:
        """Raises UserError where data to calibrate on are NaN or infinite."""
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise UserError(
                f"{type(self).__name__}, {self.bits} bits: {bad} of the {x.numel()} values (shape {list(x.shape)}) to set "
                "its step from are NaN or infinite: begin from a model that has not diverged, and look at its input"
            )

    @staticmethod
    def broadcast_channels(value: Tensor, x: Tensor) -> Tensor:
        """``value`` itself if it is a scalar; a value [C] in a shape that broadcasts over ``x`` [C, ...].

        Raises UserError where ``x`` has another number of channels.
        """
        if value.numel() == 1:
            return value
        if value.numel() != x.shape[0]:
            raise UserError(
                f"a weight has {x.shape[0]} output channels and its quantizer scales for {value.numel()}: let a layer grow by "
                "layer.weight = nn.Parameter(...), which its quantizer takes part in, and not by layer.weight.data"
            )
        return value.view(-1, *[1] * (x.dim() - 1))

    @staticmethod
    def channel_rows(x: Tensor, channels: int | None) -> Tensor:
        """``x`` as rows, one for each scale: [1, N], or [C, N / C]."""
        rows = channels or 1
        return x.reshape(rows, x.numel() // rows)  # -1 has no meaning for an empty tensor

    def extra_repr(self) -> str:
        return f"bits={self.bits}, codes {self.qn}..{self.qp}"


class Quantizer:
    """A family of fake-quantizers. Subclasses give ``weight_type`` and ``act_type``; 32 bits is nn.Identity.

    Flags of a quantizer are spelled ``--<name>_<option>`` and arrive as keyword arguments ``<option>``.
    """

    name = ""
    help = ""
    exceeds_bits = False  # its weights take more than 2^bits values
    weight_type: type[FakeQuant]
    act_type: type[FakeQuant]
    act_options: Mapping[str, Any] = MappingProxyType(
        {}
    )  # keyword arguments of act_type; those of weight_type are the flags

    def __init__(self, **options: Any) -> None:
        self.weight_options = options

    @staticmethod
    def add_args(group: argparse._ArgumentGroup) -> None:
        """Add the quantizer's own flags."""

    def weight(self, bits: int, channels: int | None = None) -> nn.Module:
        """A module for one weight tensor, with one scale, or with one for each of ``channels`` output channels."""
        return nn.Identity() if bits == 32 else self.weight_type(bits, channels=channels, **self.weight_options)

    def activation(self, bits: int) -> nn.Module:
        """A module for one activation tensor, the output of a ReLU."""
        return nn.Identity() if bits == 32 else self.act_type(bits, **self.act_options)
