"""Layers behind those that stay float, in models that torch.fx can't trace: what they take is not the model's own input."""

from __future__ import annotations

import pytest
import torch
from support.converted import counts, quantized
from torch import Tensor, nn

from lifequant import quantize_model

TOKENS = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))


class Language(nn.Module):
    """An LSTM made of Linear layers, over a number of steps that no trace knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.ih, self.hh, self.out = (
            nn.Embedding(50, 16),
            nn.Linear(16, 64),
            nn.Linear(16, 64),
            nn.Linear(16, 50),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x, outs = self.embedding(tokens), []
        h = c = torch.zeros(len(x), 16)
        for t in range(tokens.shape[1]):
            i, f, g, o = (self.ih(x[:, t]) + self.hh(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outs.append(self.out(h))
        return torch.stack(outs, 1)


class Stem(nn.Module):
    """A float stem, and layers behind it."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem, self.conv, self.relu, self.fc = stem, nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        return self.fc(self.relu(x).mean((2, 3))) if x.sum() < 1e9 else x


class Own(nn.Conv2d):
    pass


def test_an_embedding_in_front():
    torch.manual_seed(0)
    model = Language()
    q = quantized(model, TOKENS)
    assert q.quantization.inputs.keys() == {"ih", "hh", "out"} and not q.quantization.images
    assert max(counts(q, TOKENS)) <= 16
    q = quantized(model, TOKENS, weight_bits=8, act_bits=8)
    assert 0 < (q(TOKENS) - model(TOKENS)).norm() / model(TOKENS).norm() < 0.02


@pytest.mark.parametrize("stem", [Own(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))])
def test_a_float_convolution_in_front(stem):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    q = quantized(Stem(stem), x)
    assert q.quantization.inputs.keys() == {"conv", "fc"} and not q.quantization.images
    assert max(counts(q, x)[1:]) <= 16  # the first is the stem
    q = quantized(Stem(nn.Conv2d(3, 4, 3)), x)
    assert q.quantization.images == ["stem"] and q.quantization.inputs.keys() == {"conv", "fc"}


def test_parametrized_layers_are_in_the_report():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3))
    q = quantize_model(nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)))
    assert q.quantization.left == {"0": "Conv1d whose weight is parametrized"}


class Attends(nn.Module):
    """Self-attention and cross-attention, over a number of turns that no trace knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(50, 16), nn.Linear(16, 5)
        self.own, self.cross = (nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = memory = self.embedding(tokens)
        for _ in range(tokens.shape[1] // 3):
            x = x + self.own(x, x, x)[0]
            x = x + self.cross(x, memory.flip(1), memory.flip(1))[0]
        return self.out(x)


def test_an_idle_quantizer_has_no_gradient_to_wait_for():
    torch.manual_seed(0)
    q = quantized(Attends(), TOKENS)
    idle = {name for name, p in q.named_parameters() if not p.requires_grad}
    assert idle == {"own.key_quant.quant.step_size"}
    q(TOKENS).square().sum().backward()
    assert all((p.grad is None) == (name in idle) for name, p in q.named_parameters())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_every_quantizer_of_attention_is_used(kind):
    """Else DistributedDataParallel waits for its gradient. A former version's state, with such quantizers, loads strictly."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made = {"dim_feedforward": 32, "batch_first": True, "dropout": 0.0}
            self.embedding, self.decodes = nn.Embedding(50, 16), kind == "decoder"
            layer = nn.TransformerDecoderLayer if self.decodes else nn.TransformerEncoderLayer
            self.layer, self.out = layer(16, 2, **made), nn.Linear(16, 50)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            return self.out(self.layer(x, x.flip(1)) if self.decodes else self.layer(x))

    torch.manual_seed(0)
    model = Model()
    q = quantized(model, TOKENS)
    q(TOKENS).square().sum().backward()
    assert all(p.grad is not None for p in q.parameters())
    assert type(q.layer.self_attn.key_quant) is nn.Identity
    state = q.state_dict()
    former = {key.replace("act_quant", name): v for key, v in state.items() for name in ("key_quant", "value_quant")
              if "self_attn.act_quant" in key}  # fmt: skip
    other = quantize_model(model)
    assert former and not any(other.load_state_dict(state | former))
    assert torch.equal(other.eval()(TOKENS), q.eval()(TOKENS))
