"""Models that torch can't copy, that are lazy, scripted or ours; export and tracing; batches of any size."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

from lifequant import calibrate, options, quantize_model, registry
from lifequant.common.errors import UserError
from lifequant.methods.importance import at_quantized_weights
from lifequant.models.build import build
from lifequant.qat.layers import QuantConv2d, QuantLinear, QuantReLU, fake_quants

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:calibrate. .* input that no quantizer gave")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


class Keeps(nn.Module):
    """Keeps tensors of its last forward pass, as feature extractors and attention maps do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)
        self.maps: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.relu(self.conv(x))
        self.maps["last"] = [self.features * 2]
        return self.fc(self.features.mean((2, 3)))


def test_kept_tensors():
    """They are copied as values, once each; the model's own keep their graph. A penalty copies such a model, too."""
    model = Keeps()
    model(X)
    q = quantize_model(model, "lsq")
    assert torch.equal(q.features, model.features) and not q.features.requires_grad and model.features.grad_fn
    assert torch.equal(q.maps["last"][0], model.maps["last"][0])
    assert "behind a ReLU" not in str(q.quantization)
    calibrate(q, X)
    q(X)
    torch.testing.assert_close(at_quantized_weights(q)(X), q.eval()(X))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model(X)
    q = quantize_model(model, "lsq", 32, 8, 32)
    assert "parametrized" in q.quantization.left["0"]
    with torch.no_grad():
        q[0].weight_g *= 2
    assert not torch.equal(q[0](X), model[0](X))  # the weight is computed anew, from the copy's own parameters
    q[0](X).sum().backward()
    assert q[0].weight_g.grad is not None and model[0].weight_g.grad is None


def test_what_cannot_be_copied():
    model = nn.Sequential(Keeps(), nn.ReLU())
    model[0].lock = threading.Lock()
    with pytest.raises(
        UserError, match=r"for '0' \(Keeps\) keeps 'lock' \(lock\): take it off, quantize, and set it again"
    ):
        quantize_model(model)
    for lazy in (nn.LazyConv2d(4, 3), nn.LazyConvTranspose2d(4, 3), nn.LazyBatchNorm2d()):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), lazy)
        with pytest.raises(UserError, match=r"'2' \(Lazy\w+\) has no shape yet, as it is lazy: run the model once"):
            quantize_model(model)
        model(X)
        quantize_model(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_script_is_not_promised():
    with pytest.raises(UserError) as raised:
        quantize_model(torch.jit.script(network()))
    assert "script" not in str(raised.value).replace("RecursiveScriptModule", "")
    q = quantize_model(network(), "lsq")
    calibrate(q, X)
    with pytest.raises(UserError, match="TorchScript takes no quantized model"):
        torch.jit.script(q)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_export_and_trace(name):
    """After calibration both give the model's outputs, for other batch sizes, too; before, both say what to do."""
    q = quantize_model(network(), name).eval()
    if any(quant.state_dict() for _, quant in fake_quants(q)):
        for make in (torch.jit.trace, lambda q, x: torch.export.export(q, (x,))):
            with pytest.raises(UserError, match="are not set: calibrate"):
                make(q, X)
    calibrate(q, X)
    exported = torch.export.export(q, (X,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    for twin in (exported, torch.jit.trace(q, X)):
        torch.testing.assert_close(twin(X[:3]), q(X[:3]))


def test_a_network_of_our_own():
    """At 32 bits it is a float model: it is quantized, and its own state dict loads. Below, it is refused."""
    model = build(options.make(method="original", bitW=32, abitW=32), 10).eval()
    x = torch.randn(2, 3, 32, 32)
    q = quantize_model(model, "lsq", 8, 8)
    kinds = [sum(isinstance(m, kind) for m in q.modules()) for kind in (QuantConv2d, QuantLinear, QuantReLU)]
    assert kinds == [19, 1, 19] and len(list(fake_quants(q))) == 40 and not list(fake_quants(model))
    calibrate(q, x)
    q.load_state_dict(model.state_dict())
    assert torch.equal(quantize_model(model, "lsq", 32, 32, 32)(x), model(x))
    with pytest.raises(UserError, match=r"already quantized \('conv1.weight_quant'\)"):
        quantize_model(build(options.make(method="original", bitW=4, abitW=32), 10))


def test_batches_of_any_size():
    """An empty batch passes, sets no scale and gives zero gradients; the first batch with images calibrates."""
    q = quantize_model(network(), "lsq")
    with pytest.raises(UserError, match="there is no batch"):
        calibrate(q, X[:0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert q(X[:0]).shape == (0, 5)
    other = quantize_model(network(), "lsq")
    with pytest.warns(UserWarning, match="were not set"):
        q(X)
    calibrate(other, [X[:0], X])
    q, other = q.eval(), other.eval()
    assert [f.scale() for _, f in fake_quants(q)] == [f.scale() for _, f in fake_quants(other)]
    q(X[:0]).sum().backward()
    assert not any(p.grad.any() for p in q.parameters() if p.grad is not None)
    torch.testing.assert_close(torch.cat([q(x[None]) for x in X]), q(X))
    torch.testing.assert_close(q(X.to(memory_format=torch.channels_last)), q(X))
