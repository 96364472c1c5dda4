"""Fold BatchNorm into the quantized layer before it, once training has ended."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from lifequant.common.errors import UserError
from lifequant.qat.convert_functions import trace
from lifequant.qat.copying import copied
from lifequant.qat.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear, fake_quants
from lifequant.quantizers.base import FakeQuant

NORMS = {
    QuantConv2d: (nn.BatchNorm2d, nn.SyncBatchNorm),
    QuantConvTranspose2d: (nn.BatchNorm2d, nn.SyncBatchNorm),
    QuantLinear: (nn.BatchNorm1d, nn.SyncBatchNorm),
}
OWN_FORWARD = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)  # a subclass may do more
LAYERS, KINDS = "Conv2d, ConvTranspose2d or Linear", "BatchNorm2d or BatchNorm1d"


class FoldedWeight(FakeQuant):
    """What another quantizer gives, times a factor for each output channel: codes stay, and the scale is multiplied.

    ``scale`` [C] has the factor's sign, so a BatchNorm whose weight is negative is folded exactly, whatever the codes' range.
    ``groups`` is that of a transposed convolution, whose weight is [in, C / groups, ...]; None where it is [C, ...].
    """

    groups: int | None = None  # of models that a former version pickled, too

    def __init__(self, quant: FakeQuant, factor: Tensor, groups: int | None = None) -> None:
        super().__init__(quant.bits, quant.qn, quant.qp)
        self.quant, self.groups = quant, groups
        self.channels = getattr(quant, "channels", None)
        self.exceeds_bits = quant.exceeds_bits
        self.register_buffer("factor", factor)
        self.is_set = None if quant.is_set is None else quant.is_set.clone()
        self.calibrated = True

    def _times(self, values: Tensor) -> Tensor:
        return times(values, self.factor, self.groups)

    def quantize(self, x: Tensor) -> Tensor:
        return self._times(self.quant(x))

    def codes(self, x: Tensor) -> Tensor:
        return self.quant.codes(x)

    def to_codes(self, x: Tensor) -> Tensor:
        return self.quant.to_codes(x)

    def dequantize(self, u: Tensor, x: Tensor) -> Tensor:
        return self._times(self.quant.dequantize(u, x))

    def inverse(self, u: Tensor, x: Tensor) -> Tensor:
        return self.quant.inverse(u, x)

    def scale(self) -> Tensor:
        return self.quant.scale() * self.factor

    def calibrate(self, x: Tensor) -> None:
        raise UserError("a model with folded BatchNorm keeps its scales: calibrate it before fold_batchnorm")


class FoldedBatchNorm1d(nn.Identity):
    """Where a BatchNorm1d stood behind a Linear: it normalized the last dimension only if there are two."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            raise UserError(
                f"a BatchNorm1d that was folded into the Linear before it takes [N, C], and not {list(input.shape)}, whose "
                "second dimension it would normalize: name the pairs to fold, fold_batchnorm(q, pairs=[...]), without this"
            )
        return input


def times(weight: Tensor, factor: Tensor, groups: int | None) -> Tensor:
    """A weight with each output channel times its ``factor`` [C]; ``groups`` is as for FoldedWeight."""
    if groups is None:
        return weight * factor.view(-1, *[1] * (weight.dim() - 1))
    per_group = factor.view(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (weight.unflatten(0, (groups, -1)) * per_group).flatten(0, 1)


def fold_batchnorm(q: nn.Module, pairs: Iterable[tuple[str, str]] | None = None) -> nn.Module:
    """Return a copy of a quantized model in which BatchNorm is folded into the quantized layer before it.

    This is a BatchNorm2d behind a Conv2d or ConvTranspose2d, and a BatchNorm1d behind a Linear that gives [N, C].

    The function in eval mode stays the same up to float rounding, for every quantizer: the latent weights and their codes
    stay, a channel's scale is multiplied by gamma / sqrt(var + eps), and what BatchNorm adds is the layer's bias, in float.
    An nn.Identity takes BatchNorm's place. torch's own folding multiplies the latent weights, which changes their codes, and
    is refused.

    A BatchNorm is folded where it alone takes what a layer gives and where both run once, as torch.fx traces the
    model. ``pairs`` names layers and their BatchNorms, [("conv1", "bn1"), ...], for a model that can't be traced.
    Raises UserError for a model that is in train mode or not calibrated, that can't be traced, or has nothing to fold.
    """
    modules = dict(q.named_modules())
    found = list(_traced_pairs(q) if pairs is None else pairs)
    for conv, norm in found:
        _check(modules, conv, norm)
    if not found:
        raise UserError(f"fold_batchnorm: no BatchNorm of the model follows a quantized layer (a {KINDS} a {LAYERS})")
    folded = copied(q, "fold_batchnorm")
    for conv, norm in found:
        _fold(folded, conv, norm)
    return folded


def _traced_pairs(q: nn.Module) -> list[tuple[str, str]]:
    try:
        traced = trace(q, train=False)
    except Exception as error:
        raise UserError(
            f"fold_batchnorm: torch.fx can't trace the model ({type(error).__name__}); name the layers yourself: "
            'fold_batchnorm(q, pairs=[("conv1", "bn1"), ...])'
        ) from error
    modules = traced.modules
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    owners: dict[int, list[fx.Node]] = {}  # of each module, its calls: a module may have several names
    for node in calls:
        owners.setdefault(id(modules[node.target]), []).append(node)
    found = []
    for norm in calls:
        before = norm.args[0] if norm.args else None
        if before not in calls or not _fits(modules[before.target], modules[norm.target]):
            continue
        once = all(len(owners[id(modules[node.target])]) == 1 for node in (before, norm))
        if once and len(before.users) == 1:
            found.append((before.target, norm.target))
    return found


def _fits(layer: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether they are a quantized layer and a BatchNorm of its kind."""
    return isinstance(norm, NORMS.get(type(layer), ())) and type(norm).forward in OWN_FORWARD


def _check(modules: dict[str, nn.Module], conv: str, norm: str) -> None:
    """Raises UserError where a pair can't be folded."""
    layer, bn = modules.get(conv), modules.get(norm)
    if not _fits(layer, bn):
        kinds = [type(modules[name]).__name__ if name in modules else "not there" for name in (conv, norm)]
        raise UserError(
            f"fold_batchnorm: {conv!r} is {kinds[0]} and {norm!r} is {kinds[1]}: a pair is a quantized {LAYERS} and its {KINDS}"
        )
    if bn.training:
        raise UserError(f"fold_batchnorm: {norm!r} is in train mode: call q.eval() before")
    if bn.running_mean is None:
        raise UserError(
            f"fold_batchnorm: {norm!r} keeps no running statistics, so it depends on the batch and can't be folded"
        )
    outputs = layer.weight.shape[0] if isinstance(layer, QuantLinear) else layer.out_channels
    if bn.num_features != outputs:
        raise UserError(f"fold_batchnorm: {conv!r} has {outputs} outputs and {norm!r} takes {bn.num_features}")
    unset = [n for n, quant in fake_quants(layer) if quant.state_dict() and not quant.calibrated]
    if unset:
        raise UserError(f"fold_batchnorm: the scale of {conv}.{unset[0]} is not set: calibrate the model before")


@torch.no_grad()
def _fold(q: nn.Module, conv: str, norm: str) -> None:
    """Fold one pair, in place."""
    layer, bn = q.get_submodule(conv), q.get_submodule(norm)
    groups = layer.groups if isinstance(layer, QuantConvTranspose2d) else None
    factor = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        factor = factor * bn.weight
    bias = -bn.running_mean * factor
    if layer.bias is not None:
        bias = bias + layer.bias * factor
    if bn.bias is not None:
        bias = bias + bn.bias
    if isinstance(layer.weight_quant, FakeQuant):
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        layer.weight_quant = FoldedWeight(layer.weight_quant, factor.to(wide), groups)
    else:
        layer.weight.copy_(times(layer.weight, factor, groups))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)
    owner, _, attribute = norm.rpartition(".")
    gone = FoldedBatchNorm1d() if isinstance(layer, QuantLinear) else nn.Identity()
    setattr(q.get_submodule(owner), attribute, gone)


def foldable(q: nn.Module) -> list[tuple[str, str]]:
    """The pairs that ``fold_batchnorm(q)`` folds and that leave scales along the weight's first dimension.

    Those of a transposed convolution lie along the second, which no exported form has. None where torch.fx can't trace the model.
    """
    try:
        pairs = _traced_pairs(q)
    except UserError:
        return []
    return [(layer, norm) for layer, norm in pairs if not isinstance(q.get_submodule(layer), QuantConvTranspose2d)]
