"""``quantize_model`` and ``calibrate`` leave a model what it is: its function, its state, its dtype, its modes and buffers."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lifequant import calibrate, quantize_model, registry
from lifequant.common.errors import UserError
from lifequant.qat.layers import fake_quants
from lifequant.qat.refit import GAUSSIAN, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:calibrate. .* input that no quantizer gave")
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FITTING = [
    name for name in registry.names("quantizer") if name != "alignq"
]  # alignq's values are of another distribution


def net() -> nn.Sequential:
    """Depthwise in the middle, with filters whose mean is not 0 and of different sizes, as trained ones have."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    )
    with torch.no_grad():
        model[2].weight.add_(0.3 * torch.arange(1, 9).view(8, 1, 1, 1) / 8)
    return model.eval()


def quantized(name: str = "lsq", bits: int = 8, **more: object) -> nn.Module:
    q = quantize_model(net(), name, bits, bits, first_last_bits=None, **more)
    calibrate(q, X)
    return q


def test_table_of_gaussian_errors():
    """The least error of a uniform quantizer on a Gaussian, by integration over each cell."""

    def error(step: float, bits: int) -> float:
        edges = step * torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)).double().numpy()
        a, b = [-float("inf"), *edges], [*edges, float("inf")]
        levels = [*(edges - step / 2), edges[-1] + step / 2]
        total = 0.0
        for low, high, level in zip(a, b, levels, strict=True):
            p, m = norm.cdf(high) - norm.cdf(low), norm.pdf(low) - norm.pdf(high)
            second = p + (low * norm.pdf(low) if low > -9e9 else 0) - (high * norm.pdf(high) if high < 9e9 else 0)
            total += second - 2 * level * m + level**2 * p
        return total

    for bits, expected in GAUSSIAN.items():
        found = minimize_scalar(error, (4 / 2**bits, 8 / 2**bits), args=(bits,)).fun ** 0.5
        assert expected == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", FITTING)
def test_eight_bits_keep_the_function(name, per_channel):
    """Outputs within a few percent of the float network's, and no warning of an error."""
    model = net()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*out of proportion")
        q = quantized(name, per_channel=per_channel)
    assert (q(X) - model(X)).norm() / model(X).norm() < 0.08
    assert all(len(q[i].weight_quant(q[i].weight).unique()) <= 256 * (8 if per_channel else 1) for i in (0, 2))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("name", "scale"), [("dorefa", 2.0), ("pact", 1.0), ("proxq", 0.1)])
def test_eight_bits_keep_large_weights(name, scale, per_channel):
    """Within twice the error of the best uniform quantizer of a Gaussian, where a tanh would bend the weights or a mean is lost."""
    conv = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        drawn = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(0))
        conv.weight.copy_(scale * (drawn - drawn.mean() + 0.03))
    q = quantize_model(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), conv), name, 8, 8, None, per_channel=per_channel)
    calibrate(q, X[:, :3])
    quant = q[2].weight_quant
    assert (quant(conv.weight) - conv.weight).norm() / conv.weight.norm() < 2 * GAUSSIAN[8]
    assert len(quant.codes(conv.weight).unique()) <= 256
    state = {key: value for key, value in q.state_dict().items() if not key.endswith("weight_quant.input_scale")}
    q.load_state_dict(state)  # a former version's


def test_what_does_not_suit_is_named():
    """AlignQ makes any weights uniformly distributed; lsq at 8 bits is given as it is."""
    with pytest.warns(UserWarning, match=r"changes \d layers out of proportion .*most of all .*per_channel=True"):
        q = quantized("alignq")
    assert q.quantization.inaccurate and "out of proportion" in str(q.quantization)
    fine = quantized()
    assert not fine.quantization.inaccurate and len(fine.quantization.errors) == 5
    assert fine.quantization.errors["2"] == pytest.approx(relative_error(fine[2].weight_quant, net()[2].weight))
    assert all(quant.output_gain is None and quant.input_scale is None for _, quant in fake_quants(fine))


def test_weights_without_a_scale_stay_float():
    blur = nn.Conv2d(3, 3, 3, groups=3)
    nn.init.constant_(blur.weight, 1 / 9)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), blur, nn.ReLU(), nn.Conv2d(3, 4, 1))
    q = quantize_model(model)
    assert q.quantization.left == {"2": "Conv2d, its weights are all alike"}
    assert torch.equal(q[2].weight_quant(q[2].weight), blur.weight)
    line = quantize_model(nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)), per_channel=True)
    assert line.quantization.left == {"0": "Linear, one weight for each scale"}


# State


@pytest.mark.parametrize("route", ["deepcopy", "pickle", "state", "ema", "copy_", "double"])
@pytest.mark.parametrize("name", ["lsq", "proxq", "dorefa", "lsqplus"])
def test_a_copy_is_the_same_quantizer(route, name):
    early = quantize_model(net(), name, 8, 8, first_last_bits=None)
    average = AveragedModel(early)
    q = early
    calibrate(q, X)
    if route == "deepcopy":
        other = copy.deepcopy(q)
    elif route == "pickle":
        other = pickle.loads(pickle.dumps(q))
    elif route == "ema":
        average.update_parameters(q)
        other = average.module
    elif route == "double":
        other = copy.deepcopy(q).double().float()
    else:
        other = quantize_model(net(), name, 8, 8, first_last_bits=None)
        if route == "state":
            other.load_state_dict(q.state_dict())
        else:
            calibrate(other, 5 * X)
            for a, b in zip(other.state_dict().values(), q.state_dict().values(), strict=True):
                a.copy_(b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a first forward pass that calibrates
        torch.testing.assert_close(other(X), q(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("of", "into"), [(("lsq", 8), ("lsq", 4)), (("lsq", 4), ("llsq", 4)), (("proxq", 4), ("proxq", 2))]
)
def test_state_of_another_quantizer(of, into):
    """Its weights are taken, its scales are not, and one warning names both kinds."""
    q = quantized(*of)
    other = quantize_model(net(), *into, into[1], first_last_bits=None)
    with pytest.warns(UserWarning, match=rf"5 quantizers .*, {of[1]} bits, here .*, {into[1]} bits"):
        other.load_state_dict(q.state_dict())
    with pytest.warns(UserWarning, match="were not set"):
        other(X)
    torch.testing.assert_close(other(X), quantized(*into)(X))


def test_a_state_that_is_not_set():
    """That of a model before its calibration says so."""
    other = quantized()
    other.load_state_dict(quantize_model(net(), "lsq", 8, 8, first_last_bits=None).state_dict())
    with pytest.warns(UserWarning, match="were not set"):
        other(X)
    torch.testing.assert_close(other(X), quantized()(X))


def test_no_scalar_parameters():
    """Sharding (FSDP2) refuses them."""
    for name in registry.names("quantizer"):
        assert all(p.dim() for p in quantize_model(net(), name).parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    q = quantized()
    wanted = q(X)
    half = copy.deepcopy(q).to(dtype)
    found = half(X.to(dtype))
    assert found.dtype == dtype and (found.float() - wanted).norm() / wanted.norm() < 0.1
    own = quantize_model(net().to(dtype), weight_bits=8, act_bits=8, first_last_bits=None)
    calibrate(own, X.to(dtype))
    assert (own(X.to(dtype)).float() - wanted).norm() / wanted.norm() < 0.1
    with torch.autocast("cpu", dtype):
        assert (q(X).float() - wanted).norm() / wanted.norm() < 0.1


# Calibration


class Growing(nn.Module):
    """Counts its inputs, keeps all of them in a buffer that grows, and has one that is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.register_buffer("seen", torch.zeros(0, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("wide", torch.ones(1, 1).expand(4, 1))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if not self.training:
            assert not self.body[0].training
        self.seen = torch.cat([self.seen, x.mean((2, 3))])
        self.count += 1
        return self.body(x if mask is None else x * mask)


def test_buffers_that_grow():
    q = quantize_model(Growing().eval())
    calibrate(q, X.split(4))
    assert q.seen.shape == (0, 3) and q.count == 0 and q.wide.shape == (4, 1)
    assert not q.training


def test_inputs_of_other_kinds():
    """Keyword arguments, a dict, and a function for two inputs; each gives what a tensor does."""
    mask = torch.ones(16, 1, 8, 8)
    wanted = [quant.step_size.item() for _, quant in fake_quants(calibrated(X))]
    for batches, more in (
        ([{"x": X}], {}),
        ([(X, mask)], {"forward": lambda q, batch: q(*batch)}),
        ([{"x": X, "mask": mask}], {}),
    ):
        assert [quant.step_size.item() for _, quant in fake_quants(calibrated(batches, **more))] == wanted
    q = quantize_model(Growing().eval())
    with pytest.warns(UserWarning, match="were not set"):
        q(x=X)
    assert [quant.step_size.item() for _, quant in fake_quants(q)] == wanted


def calibrated(batches: object, **more: object) -> nn.Module:
    q = quantize_model(Growing().eval())
    calibrate(q, batches, **more)
    return q


def test_what_fails_leaves_the_model_whole():
    q = quantized()
    former = {name: value.clone() for name, value in q.state_dict().items()}
    for batches in ([X, X / 0], [], [X, X[:, :1]]):
        with pytest.raises((UserError, RuntimeError)):
            calibrate(q, batches, train=True)
        assert all(torch.equal(value, former[name]) for name, value in q.state_dict().items())
        assert not q.training and not q._forward_pre_hooks
    fresh = quantize_model(net())
    with pytest.raises(UserError):
        calibrate(fresh, [X, X / 0])
    with pytest.warns(UserWarning, match="were not set"):
        fresh(X)


def test_train_is_an_argument():
    """BatchNorm normalizes by the batch in train mode, and by its own statistics in eval mode, which is the model's."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    model[1].running_var.fill_(100.0)
    scales = {}
    for train in (None, False, True):
        q = quantize_model(model)
        calibrate(q, X, train=train)
        scales[train] = q[2].act_quant.step_size.item()
        assert not q.training
    assert scales[None] == scales[False] < scales[True] / 3
