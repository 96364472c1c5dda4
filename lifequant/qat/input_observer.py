"""Which layers take values that a quantizer gave, found out while a calibration runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lifequant.qat.layer_inputs import OpenInput, input_quantizers, places
from lifequant.quantizers.base import FakeQuant
from lifequant.quantizers.first_steps import sample

NUM_VALUES = 2**14  # values of one tensor in one batch that are looked at
ENOUGH = 0.95  # of these that a quantizer gave; not 1, because the samples can miss rare values


class LayerInputs:
    """Says of every layer whether its input is quantized, and opens the quantizers (OpenInput) that are needed."""

    def __init__(self) -> None:
        self.floats: set[str] = set()  # layers with an input that no quantizer gave
        self.images: set[str] = set()  # of these, layers that take what the model is given
        self.opened: set[OpenInput] = set()
        self.has_input: dict[OpenInput, bool] = {}  # of the layers that ran: whether any tensor goes through it
        self.first: str | None = None  # the first layer that ran, of whatever kind; what it takes stays float
        self.outputs: dict[str, Tensor] = {}  # values that each ReLU's quantizer gave in this pass, sorted
        self.model_inputs: set[int] = set()  # data pointers

    def begin(self, q: nn.Module) -> None:
        for quant in _open_inputs(q):
            quant.skips.fill_(True)

    def begin_pass(self, args: tuple, kwargs: dict) -> None:
        self.outputs.clear()
        self.model_inputs = {x.data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}

    def end_pass(self) -> None:
        """Once more, for the pass restored the buffers."""
        for quant in self.opened:
            quant.skips.fill_(False)

    def finish(self, q: nn.Module) -> None:
        """A quantizer that no tensor passed, and that may skip all of them, needs no scale.

        That of keys which are always the query is not used at all, and has no gradient that DistributedDataParallel waits for.
        """
        for quant, used in self.has_input.items():
            if quant.idle == used:  # else the user may have frozen it
                quant.requires_grad_(used)
            quant.idle = not used
        for quant in _open_inputs(q):
            if bool(quant.skips):
                quant.quant.calibrated = True

    def keep(self, name: str, x: Tensor) -> None:
        """After a ReLU ran: keep the values that it gave."""
        if x.numel():
            former = self.outputs.get(name, x.new_empty(0)).float().to(x.device)
            self.outputs[name] = torch.cat([former, sample_with_extremes(x)]).unique()

    def begin_with(self, name: str) -> None:
        """A layer with a weight ran or is to run: what others take later is not what the model was given."""
        self.first = name if self.first is None else self.first

    def see(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a layer runs, with its arguments."""
        self.begin_with(name)
        seen: list[Tensor] = []
        for place, argument, keyword in places(layer):
            quant = getattr(layer, place)
            if isinstance(quant, OpenInput):
                self.has_input.setdefault(quant, False)
            x = args[argument] if len(args) > argument else kwargs.get(keyword)
            if not torch.is_tensor(x) or any(x is other for other in seen):  # attention quantizes one tensor once
                continue
            seen.append(x)
            if isinstance(quant, OpenInput):
                self.has_input[quant] = True
                image = quant.may_be_image and (name == self.first or x.data_ptr() in self.model_inputs)
                if quant not in self.opened and (image or self.of_one_quantizer(x)):
                    self.floats |= {name} if image else set()
                    self.images |= {name} if image else set()
                else:
                    self.opened.add(quant)
                    quant.skips.fill_(False)
            elif not isinstance(quant, FakeQuant) and not self.of_quantizers(x):
                self.floats.add(name)

    def of_quantizers(self, x: Tensor) -> bool:
        """Whether quantizers gave all values of ``x``. A zero may come from padding or from a ReLU."""
        values = sample(x[x != 0], NUM_VALUES).float()
        return _share(values, torch.cat([values[:0], *(v.to(x.device) for v in self.outputs.values())])) >= ENOUGH

    def of_one_quantizer(self, x: Tensor) -> bool:
        """Whether one quantizer gave all values of ``x``, which then has few; a sum of its values goes beyond them."""
        if not x.numel():
            return True
        values, (least, most) = sample(x[x != 0], NUM_VALUES).float(), x.float().aminmax()
        return len(values) > 0 and any(
            bool(v[0].clamp(max=0) <= least) and bool(most <= v[-1].clamp(min=0)) and _share(values, v) >= ENOUGH
            for v in (v.to(x.device) for v in self.outputs.values())
        )


def _share(values: Tensor, among: Tensor) -> float:
    return torch.isin(values, among).float().mean().item() if len(values) else 1.0


def _open_inputs(q: nn.Module) -> Iterator[OpenInput]:
    return (quant for _, _, quant in input_quantizers(q) if isinstance(quant, OpenInput))


def sample_with_extremes(x: Tensor) -> Tensor:
    """A sample of ``x`` with its minimum and maximum, flat, float32; all values if there are few."""
    values = sample(x, NUM_VALUES).float()
    return values if len(values) == x.numel() else torch.cat([values, x.aminmax().min[None].float(), x.amax()[None]])
