"""Attention whose weights and inputs are quantized, nn.MultiheadAttention's and Swin's."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from support.converted import counts, quantized
from torch import Tensor, nn

from lifequant import calibrate, quantize_model
from lifequant.qat.attention import QuantMultiheadAttention
from lifequant.qat.shifted_windows import ShiftedWindowAttention, ShiftedWindowAttentionV2, convert_


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("kdim", "biases"), [(None, True), (6, False)])
def test_attention_without_quantizers_is_torchs(batch_first, kdim, biases):
    torch.manual_seed(0)
    made = {"batch_first": batch_first, "kdim": kdim, "vdim": kdim}
    model = nn.MultiheadAttention(8, 2, bias=biases, add_bias_kv=biases, add_zero_attn=not biases, **made)
    q = copy.deepcopy(model)
    QuantMultiheadAttention.convert_(q, lambda *_: nn.Identity())
    long, short, size = 5, 4, 3
    for batched in (True, False):
        x, k, v = (
            torch.randn((n, e) if not batched else (size, n, e) if batch_first else (n, size, e))
            for n, e in ((short, 8), (long, kdim or 8), (long, kdim or 8))
        )
        masks = [None, torch.randn(short, long), torch.randn(2 * (size if batched else 1), short, long) > 1]
        paddings = [None, torch.arange(long).expand(*([size] if batched else []), long) > 3]
        for mask, padding, each in itertools.product(masks, paddings, (True, False)):
            given = {"attn_mask": mask, "key_padding_mask": padding, "average_attn_weights": each}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of masks of two kinds
                expected, weights = model(x, k, v, **given)
            found = q(x, k, v, **given)
            torch.testing.assert_close(found, (expected, weights))
            torch.testing.assert_close(q(x, k, v, need_weights=False, **given), (found[0], None))
    with pytest.raises(RuntimeError, match="attn_mask"):
        q(x, k, v, is_causal=True)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.self_attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x, memory = self.a(x), self.b(x)
        x = x + self.self_attention(x, x, x, need_weights=False)[0]
        return x + self.cross(x, memory, memory)[0]


def test_attention_is_quantized():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    q = quantized(Attends(), x, weight_bits=3)
    for mode in (True, False):
        found = counts(q.train(mode), x)
        assert len(found) == 10 and max(found[2:]) <= 16
    assert all(len(quant(w).unique()) <= 8 for m in (q.cross, q.self_attention) for quant, w in m.projections())
    assert q.cross.key_quant is q.cross.value_quant is not q.cross.act_quant
    assert q.quantization.images == ["a", "b"] and q.quantization.swapped["cross"].startswith(
        "MultiheadAttention, 3-bit"
    )
    q(x).sum().backward()
    assert all(p.grad is not None for p in q.parameters())
    model = Attends()
    assert (quantized(model, x, weight_bits=8, act_bits=8)(x) - model(x)).square().mean() < 1e-3


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU()])
def test_transformers_in_eval_mode(activation):
    """torch's fast paths use float weights; one of them makes a nested tensor of a padded batch."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation)
    model = nn.Sequential(nn.Embedding(20, 8), nn.TransformerEncoder(layer, 2)).eval()
    x = torch.randint(20, (4, 5))
    q = quantized(model, x)
    found = counts(q, x)
    assert len(found) == 2 * 6 and max(found) <= 16 and not q.quantization.float_inputs
    padding = torch.arange(5) > torch.tensor([4, 2, 3, 4])[:, None]
    with torch.no_grad():
        assert q[1](q[0](x), src_key_padding_mask=padding)[~padding].isfinite().all()


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
def test_shifted_windows_without_quantizers_are_torchvisions(kind):
    torch.manual_seed(0)
    for size, shift in itertools.product(((4, 4), (7, 9), (3, 5), (8, 3)), ([0, 0], [2, 2], [1, 2], [0, 2])):
        model = kind(8, [4, 4], shift, 2)
        nn.init.normal_(model.qkv.bias)
        q = copy.deepcopy(model)
        convert_(q)
        x = torch.randn(2, *size, 8)
        torch.testing.assert_close(q(x), model(x), rtol=1e-4, atol=1e-5)


def without_scales(**made) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True, **made)
    for weight in (model.in_proj_weight, model.k_proj_weight, model.out_proj.weight):
        if weight is not None:
            nn.init.constant_(weight, 0.5)
    return model


@pytest.mark.parametrize("bits", [{}, {"*": 4}])
def test_projections_without_a_scale_stay_float(bits):
    """Constant weights; of three projections only the one that has such. The function is that of the float layer."""
    x, k = torch.randn(3, 4, 8), torch.randn(3, 5, 6)
    model = without_scales()
    q = quantize_model(model, act_bits=32, layer_bits={name: (b, 32) for name, b in bits.items()})
    assert q.quantization.left == {
        "": "MultiheadAttention, its weights are all alike",
        "out_proj": "Linear, its weights are all alike",
    }
    torch.testing.assert_close(q(x, x, x), model(x, x, x))
    model = nn.ModuleDict({"a": without_scales(kdim=6, vdim=6)})
    q = quantize_model(model, layer_bits=bits)
    assert q.quantization.left["a.k_proj_weight"] == "a projection, its weights are all alike"
    assert len(q.quantization.left) == 2 and q.quantization.swapped == {
        "a": "MultiheadAttention, 4-bit weights (LSQWeight)"
    }
    weights = {id(weight): quant(weight) for quant, weight in q["a"].projections()}
    assert torch.equal(weights[id(q["a"].k_proj_weight)], model["a"].k_proj_weight)
    calibrate(q, [(x, k)], forward=lambda q, batch: q["a"](batch[0], batch[1], batch[1]))
    assert len(q["a"].q_weight_quant(q["a"].q_proj_weight).unique()) <= 16


def test_one_weight_for_each_scale():
    q = quantize_model(nn.Sequential(nn.Linear(2, 1), nn.MultiheadAttention(1, 1)), per_channel=True)
    assert q.quantization.left == {"1": "MultiheadAttention, one weight for each scale"} | {
        "1.out_proj": "Linear, one weight for each scale"
    }
