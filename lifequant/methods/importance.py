"""Importances of weights: means over images of squared or absolute gradients, and sliced gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lifequant.qat.copying import copied
from lifequant.qat.layers import fake_quants
from lifequant.qat.modes import eval_mode
from lifequant.qat.weights import body_weights, weights
from lifequant.runtime import distributed

CHUNK = 32  # images whose gradients are held at a time
MOST_GRADIENTS = 2**26  # values in them, 268 MB: of a large network fewer images
DIRECTIONS = 16  # output directions whose gradients are held at a time

Batches = Iterable[tuple[Tensor, Tensor]]  # (x float [N, ...], y int64 [N])


def at_quantized_weights(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights are the quantized ones, with nothing between them and the loss."""
    net = copied(model, "importances").eval()
    for w in list(weights(net)):
        setattr(w.module, w.parameter, nn.Parameter(w.quantized().detach()))
        setattr(w.module, w.quantizer, nn.Identity())
    return net


def latent_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: weight, not quantized} of all layers but the head."""
    return {w.name: w.tensor for w in body_weights(model)}


def protected(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of all parameters but the quantizers': latent weights, biases, BatchNorm's affine, the head."""
    quantizers = tuple(f"{name}." for name, _ in fake_quants(model))
    return {name: p for name, p in model.named_parameters() if not name.startswith(quantizers)}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All values in one new vector, in the tensors' order."""
    return torch.cat([t.reshape(-1) for t in tensors])


def image_means(
    model: nn.Module,
    values: dict[str, Tensor],
    batches: Batches,
    objective: Callable[[Tensor, Tensor], Tensor],
    measure: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """{name: mean over images of measure(d objective(f(x), y) / d w)}, in eval mode, each image's gradient on its own.

    ``values`` are parameters of ``model`` by name; ``objective`` takes logits [1, C] and labels [1]. Gradients pass
    quantizers by their straight-through estimators.
    """
    fixed = {name: p.detach() for name, p in model.named_parameters()}  # else every image's graph would be kept
    values = {name: w.detach() for name, w in values.items()}

    def of_one(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return objective(functional_call(model, {**fixed, **values}, (image[None],)), label[None])

    gradients = vmap(grad(of_one), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(w) for name, w in values.items()}
    chunk = max(1, min(CHUNK, MOST_GRADIENTS // sum(w.numel() for w in values.values())))
    count = 0
    with eval_mode(model):
        for x, y in batches:
            for images, labels in zip(x.split(chunk), y.split(chunk), strict=True):
                if distributed.is_own(count // chunk):
                    for name, g in gradients(values, images, labels).items():
                        total[name] += measure(g).sum(0)
                count += len(images)
    for value in total.values():
        distributed.total(value)
    return {name: value / count for name, value in total.items()}


def per_sample(net: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """{name: mean over images of (d CE / d w)^2} for all weights of ``net`` but the head's."""
    names = {f"{w.of}.{w.parameter}": w.name for w in body_weights(net)}
    values = {name: net.get_parameter(name) for name in names}
    means = image_means(net, values, batches, F.cross_entropy, torch.square)
    return {names[name]: value for name, value in means.items()}


def per_batch(net: nn.Module, values: dict[str, nn.Parameter], batches: Batches) -> dict[str, Tensor]:
    """{name: mean over batches of (d mean CE / d w)^2}: the published code's estimate, by the batches' size below
    ``per_sample``'s."""
    total = {name: torch.zeros_like(weight) for name, weight in values.items()}
    count = 0
    for images, labels in batches:
        count += 1
        gradients = torch.autograd.grad(F.cross_entropy(net(images), labels), list(values.values()))
        for value, g in zip(total.values(), gradients, strict=True):
            value += g.square()
    return {name: value / count for name, value in total.items()}


def sliced(model: nn.Module, batches: list[Tensor], directions: Tensor) -> Tensor:
    """[P] of ``protected``, flat: mean over directions xi of (d xi . m / d w)^2, m [K] the mean logits of all images.

    ``batches`` are images [N, ...], ``directions`` is [S, K]. In eval mode.
    """
    weights = {name: p.detach().requires_grad_() for name, p in protected(model).items()}
    total = torch.zeros_like(flat(weights.values()), requires_grad=False)
    with eval_mode(model), torch.enable_grad():
        for block in directions.split(DIRECTIONS):
            sums, count = [torch.zeros_like(total) for _ in block], 0
            for x in batches:
                logits = functional_call(model, weights, (x,)).sum(0)
                count += len(x)
                for value, direction in zip(sums, block, strict=True):
                    value += flat(
                        torch.autograd.grad(
                            logits @ direction, list(weights.values()), retain_graph=True, materialize_grads=True
                        )
                    )
            for value in sums:
                total += (value / count).square()
    return total / len(directions)
