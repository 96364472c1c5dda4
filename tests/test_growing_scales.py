"""A layer with a scale for each output channel grows: old channels keep their scales, and new ones get their own."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant import calibrate, fold_batchnorm, quantize_model, registry
from lifequant.common.errors import UserError
from lifequant.qat.refit import refit_weight, relative_error
from lifequant.qat.scales import Scales, param_groups

X = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:.* out of proportion")


class Net(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.relu, self.fc = nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.body(x)))


def network(quantizer: str = "lsq", classes: int = 2, **settings) -> nn.Module:
    torch.manual_seed(0)
    q = quantize_model(Net(classes), quantizer, per_channel=True, **settings)
    calibrate(q, X)
    with torch.no_grad():
        for p in q.fc.weight_quant.parameters():
            p.mul_(1.1)  # as if trained: nothing is what calibration gives
    return q


def longer(fc: nn.Linear, classes: int) -> nn.Linear:
    new = nn.Linear(fc.in_features, classes)
    with torch.no_grad():
        new.weight[: len(fc.weight)], new.bias[: len(fc.bias)] = fc.weight, fc.bias
        new.weight[len(fc.weight) :] *= 10
    return new


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_old_and_new_channels(name, bits):
    """The old channels stay to the bit, and so their logits, up to the order in which a product adds: another number of outputs
    may be another kernel. The new channels are those of a layer of their own that was never another."""
    for classes in (2, 15):  # APoT's table has 15 levels at 4 bits
        q = network(name, classes, first_last_bits=bits)
        before, values = q(X).detach(), q.fc.weight_quant(q.fc.weight).detach()
        scales = q.fc.weight_quant.scale().clone()
        new = longer(q.fc, classes + 3)
        q.fc.weight, q.fc.bias = new.weight, new.bias
        q.fc.out_features = classes + 3
        quant = q.fc.weight_quant
        assert torch.equal(quant(q.fc.weight)[:classes], values) and torch.equal(quant.scale()[:classes], scales)
        torch.testing.assert_close(q(X)[:, :classes].detach(), before, rtol=1e-5, atol=1e-5)
        alone = network(name, classes=3, first_last_bits=bits).fc
        alone.weight.data.copy_(new.weight[classes:])
        alone.weight_quant.calibrate(alone.weight.detach())
        refit_weight(alone.weight_quant, alone.weight)
        torch.testing.assert_close(quant.scale()[classes:], alone.weight_quant.scale())
        error = (quant(q.fc.weight) - q.fc.weight)[classes:].norm() / q.fc.weight[classes:].norm()
        assert error < 1.05 * relative_error(alone.weight_quant, alone.weight)
        grown = [t for t in (*quant.parameters(), *quant.buffers()) if t.shape == (classes + 3,)]
        assert grown and not any(t.shape == (classes,) for t in (*quant.parameters(), quant.scale()))


def test_it_trains_and_is_saved():
    q = network()
    new = longer(q.fc, 4)
    q.fc.weight, q.fc.bias = new.weight, new.bias
    assert q.fc.weight_quant.calibrated and q.fc.weight_quant.step_size.shape == (4,)
    optimizer = torch.optim.SGD(param_groups(q, lr=0.1), momentum=0.9)
    scales, former = Scales(q), q.fc.weight_quant.step_size.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(q(X), torch.arange(16) % 4).backward()
        with scales.limit_scale_updates():
            optimizer.step()
    assert (q.fc.weight_quant.step_size != former).all()
    torch.manual_seed(0)
    other = quantize_model(Net(4), per_channel=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(other.load_state_dict(q.state_dict()))
    for twin in (other, copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(twin(X), q(X))


def test_rows_of_zeros():
    """They say nothing of a scale, and take the mean of the old: a scale at its floor would never be of use."""
    q = network()
    new = longer(q.fc, 4)
    with torch.no_grad():
        new.weight[3] = 0
    scales = q.fc.weight_quant.step_size.detach().clone()
    q.fc.weight, q.fc.bias = new.weight, new.bias
    found = q.fc.weight_quant.step_size.detach()
    assert found[3] == scales.mean() and found[2] > 3 * scales.mean() and torch.equal(found[:2], scales)


def test_before_calibration():
    """It grows, too, and is calibrated as a whole later."""
    q = quantize_model(Net(2), per_channel=True)
    new = longer(q.fc, 4)
    q.fc.weight, q.fc.bias = new.weight, new.bias
    assert not q.fc.weight_quant.calibrated
    calibrate(q, X)
    fresh = registry.quantizer("lsq").weight(8, 4)
    fresh.calibrate(new.weight)
    torch.testing.assert_close(q.fc.weight_quant.scale(), fresh.scale())


def test_a_float_head_that_grew_before():
    """The first of three ways: the float model grows, and is quantized after."""
    model = Net(2)
    model.fc = longer(model.fc, 4)
    q = quantize_model(model, per_channel=True, weight_bits=8, act_bits=8)
    calibrate(q, X)
    assert (q(X) - model(X)).norm() / model(X).norm() < 0.03


def test_a_float_head_in_its_place_is_said():
    q = network()
    assert "fc" in q.quantization.swapped
    q.fc = longer(q.fc, 4)
    with pytest.warns(UserWarning, match="1 layers were put in place after quantize_model, in float: fc"):
        calibrate(q, X)
    assert q.quantization.left == {"fc": "Linear, put in place after quantize_model"}
    assert "fc" not in q.quantization.swapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(q, X)


def test_a_wrapped_head_is_none_in_its_place():
    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(24, 2, bias=False), nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    q = network()
    q.fc = Adapted(q.fc)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(q, X)
    assert "fc" not in q.quantization.left


def test_a_folded_layer_is_refused():
    torch.manual_seed(0)
    q = quantize_model(nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4)), per_channel=True)
    calibrate(q, X)
    folded = fold_batchnorm(q.eval())
    with pytest.raises(UserError, match="a FoldedWeight can't grow: let the layer grow before"):
        folded[0].weight = nn.Parameter(torch.randn(6, 12))
    assert folded(X).shape == (16, 4)


def test_errors_in_one_line():
    q = network(classes=4)
    new = longer(q.fc, 6)
    with pytest.raises(UserError, match="a weight with 4 output channels and a scale for each can't become one with 3"):
        q.fc.weight = nn.Parameter(new.weight[:3].detach())
    assert q.fc.weight.shape == (4, 24) and q(X).shape == (16, 4)
    q.fc.weight.data, q.fc.bias.data = new.weight.data, new.bias.data
    with pytest.raises(
        UserError, match=r"6 output channels and its quantizer scales for 4: .* layer.weight = nn.Parameter"
    ):
        q(X)
