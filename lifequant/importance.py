"""Squared gradients with respect to weights: the importances that penalties weigh movement by."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lifequant.quantizers.layers import QuantConv2d, weight_layers

CHUNK = 32  # images whose gradients are held at a time


def at_quantized_weights(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights are the quantized ones, with nothing between them and the loss."""
    net = copy.deepcopy(model).eval()
    for _, layer in weight_layers(net):
        layer.weight = nn.Parameter(layer.weight_quant(layer.weight).detach())
        layer.weight_quant = nn.Identity()
    return net


def conv_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """{layer: latent weight} of the convolutions."""
    return {name: layer.weight for name, layer in weight_layers(model) if isinstance(layer, QuantConv2d)}


def per_sample(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """{layer: mean over images of (d CE / d w)^2} for the convolutions of ``net``; x float [N, 3, H, W], y int64 [N]."""
    net.requires_grad_(False)  # else every image's graph would be kept
    weights = {f"{name}.weight": weight.detach() for name, weight in conv_weights(net).items()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, weights, (image[None],)), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for images, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        for name, g in gradients(weights, images, labels).items():
            total[name] += g.square().sum(0)
    return {name.removesuffix(".weight"): value / len(x) for name, value in total.items()}


def per_batch(net: nn.Module, weights: dict[str, nn.Parameter], x: Tensor, y: Tensor, size: int) -> dict[str, Tensor]:
    """{name: mean over batches of (d mean CE / d w)^2}: the published code's estimate, about 1/size of ``per_sample``."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    batches = list(zip(x.split(size), y.split(size), strict=True))
    for images, labels in batches:
        gradients = torch.autograd.grad(F.cross_entropy(net(images), labels), list(weights.values()))
        for value, g in zip(total.values(), gradients, strict=True):
            value += g.square()
    return {name: value / len(batches) for name, value in total.items()}
