"""BatchNorm folded into quantized layers: the same function, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lifequant import calibrate, fold_batchnorm, quantize_model, registry
from lifequant.common.errors import UserError
from lifequant.qat.code_usage import code_counts
from lifequant.qat.folding import foldable
from lifequant.qat.packing import packed_model_bytes

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:calibrate. .* input that no quantizer gave")


def quantized(*layers: nn.Module, quantizer: str = "lsq", **settings) -> nn.Module:
    """In eval mode and float64, with BatchNorms that scale by negative numbers, by 0 and by much."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.track_running_stats:
            if norm.affine:
                norm.weight.data.uniform_(-3, 3)
                norm.weight.data[0] = 0
                norm.bias.data.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.05, 2)
    q = quantize_model(model, quantizer, **settings)
    calibrate(q, X)
    return q.eval().double()


def blocks() -> list[nn.Module]:
    """With and without a bias, grouped, and a BatchNorm without weights."""
    return [
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5),
    ]  # fmt: skip


def more_blocks() -> list[nn.Module]:
    """Transposed convolutions, of groups too, and Linear; momentum None, and a BatchNorm1d without weights."""
    return [
        nn.ConvTranspose2d(3, 8, 2, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(7350, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5, affine=False),
    ]  # fmt: skip


def off(folded: nn.Module, q: nn.Module, x: Tensor) -> float:
    return ((folded(x) - q(x)).norm() / q(x).norm()).item()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_the_same_function(name, per_channel):
    q = quantized(*blocks(), quantizer=name, per_channel=per_channel)
    before = q(X.double()).detach()
    folded = fold_batchnorm(q)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) and not folded.training
    assert before.std() > 0.1 and off(folded, q, X.double()) < 1e-10
    assert torch.equal(q(X.double()), before) and sum(isinstance(m, nn.BatchNorm2d) for m in q.modules()) == 3
    for place, norm in ((0, 1), (3, 4), (6, 7)):
        former, now, bn = q[place], folded[place], q[norm]
        factor = (1.0 if bn.weight is None else bn.weight) / (bn.running_var + bn.eps).sqrt()
        assert torch.equal(now.weight_quant.codes(now.weight), former.weight_quant.codes(former.weight))
        torch.testing.assert_close(now.weight_quant.scale(), former.weight_quant.scale() * factor)
        values = former.weight_quant(former.weight) * factor[:, None, None, None]
        torch.testing.assert_close(now.weight_quant(now.weight), values)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_transposed_convolutions_and_linear(name, per_channel):
    q = quantized(*more_blocks(), quantizer=name, per_channel=per_channel)
    folded = fold_batchnorm(q)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in folded.modules())
    assert q(X.double()).std() > 0.1 and off(folded, q, X.double()) < 1e-10
    for place, norm in ((0, 1), (3, 4), (7, 8), (10, 11)):
        former, now, bn = q[place], folded[place], q[norm]
        factor = (1.0 if bn.weight is None else bn.weight) / (bn.running_var + bn.eps).sqrt()
        assert torch.equal(now.weight_quant.codes(now.weight), former.weight_quant.codes(former.weight))
        torch.testing.assert_close(now.weight_quant.scale(), former.weight_quant.scale() * factor)
    assert foldable(q) == [("7", "8"), ("10", "11")]
    assert folded[3].weight_quant.scale().shape == (6,) and packed_model_bytes(folded) > 0
    twin = copy.deepcopy(folded)
    assert torch.equal(twin(X.double()), folded(X.double()))


def test_at_32_bits():
    """The weights themselves are multiplied, as torch's own folding does it."""
    q = quantized(*more_blocks(), weight_bits=32, act_bits=32, first_last_bits=32)
    folded = fold_batchnorm(q)
    assert off(folded, q, X.double()) < 1e-12
    linear, conv = nn.Linear(7350, 8).double().eval(), nn.ConvTranspose2d(3, 8, 2, bias=False).double().eval()
    linear.load_state_dict(q[7].state_dict())
    conv.load_state_dict(q[0].state_dict())
    for found, expected in (
        (folded[7], fuse_linear_bn_eval(linear, q[8])),
        (folded[0], fuse_conv_bn_eval(conv, q[1], transpose=True)),
    ):
        torch.testing.assert_close(found.weight, expected.weight)
        torch.testing.assert_close(found.bias, expected.bias)


def test_linear_over_sequences():
    """A BatchNorm1d behind a Linear that gives [N, L, C] normalizes L. Nobody sees it in the graph: the folded model says so."""
    q = quantized(nn.Flatten(2), nn.Linear(256, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 4))
    folded = fold_batchnorm(q)
    with pytest.raises(UserError, match=r"takes \[N, C\], and not \[6, 3, 3\].*: name the pairs"):
        folded(X.double())


class Named(nn.BatchNorm2d):
    pass


class Activates(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_subclass_that_does_more_is_refused():
    q = quantized(nn.Conv2d(3, 4, 3), Named(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert off(fold_batchnorm(q), q, X.double()) < 1e-10
    q = quantized(nn.Conv2d(3, 4, 3), Activates(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with pytest.raises(UserError, match=r"torch\.fx can't trace the model"):
        fold_batchnorm(q)
    with pytest.raises(
        UserError, match="'1' is Activates: a pair is a quantized Conv2d, ConvTranspose2d or Linear and"
    ):
        fold_batchnorm(q, [("0", "1")])


def test_a_residual_network():
    """A network of torchvision's, and one of our own: every BatchNorm goes."""
    for q in (
        quantized(torchvision.models.resnet18(num_classes=5)),
        quantized(torchvision.models.mobilenet_v2(num_classes=5), quantizer="llsq"),
    ):
        folded = fold_batchnorm(q)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert off(folded, q, X.double()) < 1e-9


def test_what_a_folded_model_can_do():
    """It is copied and saved, trains, and its codes and bytes are counted under the same names."""
    q = quantized(*blocks()).float()
    folded, twin = fold_batchnorm(q), fold_batchnorm(q)
    assert code_counts(folded, X).keys() == code_counts(q, X).keys()
    assert packed_model_bytes(folded) > 0
    F.cross_entropy(folded(X), torch.arange(6) % 5).backward()
    assert all(p.grad is not None for p in folded.parameters())
    with torch.no_grad():
        folded[0].weight += 0.1
    twin.load_state_dict(folded.state_dict())
    assert torch.equal(twin(X), folded(X)) and torch.equal(copy.deepcopy(folded)(X), folded(X))
    assert not twin._forward_pre_hooks  # its scales are set


class Branches(nn.Module):
    """What ``conv`` gives is used twice, ``twice`` runs twice; only ``last`` has a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.twice, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.last, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.relu(self.norm(x) + x)
        x = self.relu(self.twice(self.norm2(self.twice(x))))
        return self.norm3(self.last(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.relu(x) if x.sum() > 0 else self.relu(-x)


def test_only_where_it_is_the_same():
    q = quantized(Branches())
    folded = fold_batchnorm(q)
    assert [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["norm", "norm2"]
    assert off(folded, q, X.double()) < 1e-10
    with pytest.raises(UserError, match="no BatchNorm of the model follows"):
        fold_batchnorm(folded)


def test_pairs_by_name():
    q = quantized(Branching())
    with pytest.raises(UserError, match=r"torch.fx can't trace the model \(TraceError\); name the layers yourself"):
        fold_batchnorm(q)
    assert off(fold_batchnorm(q, [("conv", "norm")]), q, X.double()) < 1e-10
    with pytest.raises(UserError, match="'relu' is QuantReLU"):
        fold_batchnorm(q, [("conv", "relu")])
    with pytest.raises(UserError, match="'norm9' is not there"):
        fold_batchnorm(q, [("conv", "norm9")])


def test_refusals():
    q = quantized(*blocks())
    with pytest.raises(UserError, match=r"'1' is in train mode: call q.eval\(\) before"):
        fold_batchnorm(q.train())
    with pytest.raises(UserError, match=r"scale of 0\.weight_quant is not set: calibrate"):
        fold_batchnorm(quantize_model(nn.Sequential(*blocks()), "lsq").eval())
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()]
    with pytest.raises(UserError, match="keeps no running statistics"):
        fold_batchnorm(quantized(*layers))


def test_torchs_own_folding_is_refused():
    """It would multiply the latent weights under the former scale."""
    q = quantized(*blocks())
    with pytest.raises(UserError, match=r"use lifequant.fold_batchnorm\(q\)"):
        fuse_conv_bn_eval(q[0], q[1])
    linear = quantized(nn.Flatten(), nn.Linear(768, 4), nn.BatchNorm1d(4))
    with pytest.raises(UserError, match="fold_batchnorm"):
        fuse_linear_bn_eval(linear[1], linear[2])
    q[0].weight = nn.Parameter(q[0].weight.detach() * 2)  # anybody else may set it
