"""Every registered quantizer inside a network: one graph for torch.compile, and gradients of each sample by vmap."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.small_net import SmallNet
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lifequant import registry
from lifequant.losses import LOSSES
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.layers import Scheme
from lifequant.qat.weights import quantized_weights

NAMES = registry.names("quantizer")


def bell(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class OneLayer(nn.Module):
    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = scheme.conv(3, 4, 3), nn.BatchNorm2d(4), scheme.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole(name):
    """One graph, one step a channel; values and gradients, those of the steps too, are those of eager mode."""
    family = registry.quantizer(name)
    model = OneLayer(Scheme(family, family, 4, 4, per_channel=True))
    x, y = bell(8, 3, 6, 6), torch.arange(8) % 4
    calibrate_network(model, x)

    torch.compiler.reset()  # else former tests count against the limit of recompilations

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def run(function) -> list[Tensor]:
        model.zero_grad()
        value = function(x, y)
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    torch.testing.assert_close(run(torch.compile(loss, fullgraph=True, backend="aot_eager")), run(loss))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_each_sample(name):
    """vmap(grad) through weight and activation quantizers gives what one backward pass for each image gives."""
    torch.manual_seed(0)
    family = registry.quantizer(name)
    model = SmallNet(Scheme(family, family, 4, 4)).double()  # else rounding errors change a code
    x, y = bell(4, 3, 8, 8).double(), torch.arange(4)
    calibrate_network(model, x)
    for _ in range(30):
        model(x)  # BatchNorm's statistics
    model.eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (image[None],)), label[None])

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # vmap warns where it falls back to a loop
        found = vmap(grad(loss), (None, 0, 0))(weights, x, y)
    for i in range(len(x)):
        one = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        parameters = dict(model.named_parameters())
        for key, expected in zip(names, torch.autograd.grad(one, [parameters[k] for k in names]), strict=True):
            torch.testing.assert_close(found[key][i], expected, msg=lambda text, k=key: f"{k}: {text}")
    assert all(found[f"{layer}.weight"].abs().sum() > 0 for layer in ("conv1", "conv2", "fc"))


def test_losses_compile_whole():
    """torch.compile takes model, losses and penalty in one graph; values and gradients are those of eager mode."""
    torch.manual_seed(0)
    family = registry.quantizer("proxq")
    model = SmallNet(Scheme(family, family, 4, 4))
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))
    calibrate_network(model, x)
    counts = torch.tensor([3.0, 1, 9, 4, 2])
    guard = registry.penalty("proxq")(SimpleNamespace(ll_lambda=1.0))
    convolutions = {k: v for k, v in quantized_weights(model).items() if v.dim() == 4}
    importance = {k: torch.rand_like(v) for k, v in convolutions.items()}
    anchor = {k: v + 0.1 * torch.randn_like(v) for k, v in convolutions.items()}
    scale = {k: torch.ones(()) for k in convolutions}
    guard.load_state_dict({"importance": importance, "anchor": anchor, "scale": scale, "anchor_bytes": 0})

    def losses(x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        return torch.stack([*(loss(logits, y, counts) for loss in LOSSES.values()), guard.penalty(model)])

    def run(function) -> list[Tensor]:
        model.zero_grad()
        values = function(x, y)
        values.sum().backward()
        return [values.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    eager = run(losses)
    assert (eager[0] > 0).all()
    torch.testing.assert_close(run(torch.compile(losses, fullgraph=True, backend="aot_eager")), eager)


def test_apot_keeps_channels_last():
    x = bell(2, 3, 4, 4).relu().to(memory_format=torch.channels_last)
    quant = registry.quantizer("apot").activation(4)
    assert quant(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(quant(x), quant(x.contiguous()))
