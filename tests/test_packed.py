"""Packed files: the bit stream against integers of Python, the network against the one that was trained, to the bit."""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from support.hostile import refused
from support.packed import parts, trained
from support.tiny import CLASSES, SIDE, train
from torch import nn

import lifequant
from lifequant import options, registry
from lifequant.checkpointing import packed
from lifequant.checkpointing.packed import load_packed, write_packed
from lifequant.models.resnet import ResNet
from lifequant.qat.layers import Scheme, weight_layers
from lifequant.qat.packing import pack_codes, packed_model_bytes, unpack_codes
from lifequant.quantizers.apot import powers_of_two
from lifequant.quantizers.base import FakeQuant
from lifequant.quantizers.lsq import LSQWeight


@pytest.mark.parametrize("bits", range(1, 17))
def test_bit_stream(bits):
    """The stream is one large integer, the first code its lowest bits; at 4 bits a byte has a code in each half."""
    draw = np.random.default_rng(bits)
    for count in (0, 1, 7, 8, 33):
        first = int(draw.integers(-(2**15), 2**15))
        codes = draw.integers(0, 2**bits, count) + first
        stream = pack_codes(torch.from_numpy(codes), bits, first)
        whole = sum(int(code - first) << (bits * place) for place, code in enumerate(codes))
        assert stream.dtype == torch.uint8 and len(stream) == -(-count * bits // 8)
        assert int.from_bytes(bytes(stream.tolist()), "little") == whole
        assert unpack_codes(stream, bits, first, count).tolist() == codes.tolist()
    if bits == 4:
        assert pack_codes(torch.tensor([[1, 2], [15, 0]]), 4, 0).tolist() == [0x21, 0x0F]


def is_channels_last(x: torch.Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def same_logits(a: nn.Module, b: nn.Module, images: torch.Tensor) -> bool:
    return all(torch.equal(a(part), b(part)) for size in (1, 32) for part in images.split(size)[:2])


CASES = [
    *({"quantizer": q, "bitW": b} for q in registry.names("quantizer") for b in (2, 8)),
    *({"quantizer": q, "bitW": 3, "per_channel": True, "shortcut": "conv"} for q in registry.names("quantizer")),
    {"layer_bits": "layer1.*=32/4,layer2.0.conv1=8,layer3.*=2/4", "quantizer": "apot", "act_quantizer": "lsqplus"},
    {"bitW": 32},
    {"quantizer": "proxq", "proxq_c": 2.0, "proxq_learn_c": True, "target_model": "resnet56"},
    {"quantizer": "uniform", "layer_bits": "fc=32/8", "abitW": 5},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_same_logits(settings, tmp_path):
    model, config = trained(tmp_path, **settings)
    write_packed(tmp_path / "small.safetensors", model, config, CLASSES)
    found = lifequant.load(tmp_path / "small.safetensors")
    images = torch.randn(33, 3, SIDE, SIDE)
    with torch.no_grad():
        assert same_logits(model, found, images)
    assert same_logits(model, found, images[:1].contiguous(memory_format=torch.channels_last))  # with a graph
    assert found.class_names == CLASSES and found.image_size == SIDE and not found.training
    for (name, ours), (_, theirs) in zip(weight_layers(found), weight_layers(model), strict=True):
        quantized = isinstance(theirs.weight_quant, FakeQuant)
        assert torch.equal(ours.weight, theirs.weight_quant(theirs.weight)), name
        assert is_channels_last(ours.weight_quant(ours.weight)) == is_channels_last(theirs.weight_quant(theirs.weight))
        assert ours.weight.requires_grad is not quantized
        if quantized:
            codes = ours.weight_quant.codes(ours.weight)
            assert torch.equal(codes, theirs.weight_quant.codes(theirs.weight)) and not codes.is_floating_point()
            assert torch.equal(ours.weight_quant.scale(), theirs.weight_quant.scale())
    assert packed_model_bytes(found) == packed_model_bytes(model)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_run(bits, tiny, tmp_path):
    """Its file has the size that results.json states, within 5 %, and gives the logits of its test images."""
    job = tmp_path / "run"
    stated = train(tiny, job, bitW=bits, num_tasks=1)["memory_bytes"]["packed_model"]
    model = lifequant.load(job)
    path = tmp_path / "new folder" / "small.safetensors"
    write_packed(path, model, options.make(image_size=SIDE, bitW=bits), CLASSES, method="ours", tasks=1, accuracy=None)
    assert path.stat().st_size == pytest.approx(stated, rel=0.05)
    assert load_packed(path).facts == {"method": "ours", "tasks": 1}
    images = torch.cat([model.preprocess(file) for file in sorted((tiny.images / "test").rglob("*.png"))])
    with torch.no_grad():
        assert same_logits(model, lifequant.load(path), images)


@pytest.mark.parametrize("settings", [{"quantizer": "proxq", "per_channel": True}, {"quantizer": "dorefa"}])
def test_size_of_a_hundred_classes(settings, tmp_path):
    model, config = trained(tmp_path, classes=100, bitW=2, **settings)
    write_packed(tmp_path / "small.safetensors", model, config, model.class_names)
    assert (tmp_path / "small.safetensors").stat().st_size == pytest.approx(packed_model_bytes(model), rel=0.05)


def value_of(quantizer: str, codes: np.ndarray, entries: dict[str, np.ndarray], bits: int, first: int) -> np.ndarray:
    """The weights that codes stand for, as docs/export.md says it; float32."""
    u, most = codes.astype(np.float32), np.float32(2**bits - 1)
    if quantizer in ("lsq", "lsqplus", "llsq"):
        return u * entries["step_size"]
    if quantizer == "proxq":
        return u * (entries["alpha"] / np.float32(2 ** (bits - 1) - 1))
    if quantizer == "apot":
        magnitudes = powers_of_two(bits - 1)
        levels = np.array(sorted({*magnitudes, *(-level for level in magnitudes)}), np.float32)
        return entries["alpha"] * levels[codes - first]
    return u / np.float32(2**3 - 1) if quantizer == "uniform" else 2 * u / most - 1


@pytest.mark.parametrize("quantizer", registry.names("quantizer"))
def test_read_by_numpy_alone(quantizer, tmp_path):
    """As docs describe the file: codes by numpy.unpackbits, and the rest in the order of the state dict."""
    model, config = trained(tmp_path, quantizer=quantizer, bitW=3, first_last_bits=3, per_channel=True)
    write_packed(tmp_path / "small.safetensors", model, config, CLASSES)
    header, ours, data = parts((tmp_path / "small.safetensors").read_bytes())
    network = {"quantizer": quantizer, "bitW": 3, "first_last_bits": 3, "per_channel": True}
    assert ours["network"] == network and ours["class_names"] == CLASSES
    layers = dict(weight_layers(model))
    assert header.keys() - {"__metadata__", ".rest"} == ours["codes"].keys() == layers.keys()
    start, stop = header[".rest"]["data_offsets"]
    rest, entries = np.frombuffer(data[start:stop], "<f4"), {}
    coded = {f"{name}.weight" for name in layers} | {f"{name}.weight_quant.c" for name in layers}
    for name, value in model.state_dict().items():
        if name not in coded and not name.endswith("num_batches_tracked"):
            entries[name], rest = rest[: value.numel()], rest[value.numel() :]
            assert np.array_equal(entries[name], value.numpy().ravel())
    assert not len(rest)
    for name, (bits, first) in ours["codes"].items():
        start, stop = header[name]["data_offsets"]
        stream = np.unpackbits(np.frombuffer(data[start:stop], np.uint8), bitorder="little")
        weight = layers[name].weight
        codes = stream[: bits * weight.numel()].reshape(-1, bits) @ (1 << np.arange(bits)) + first
        own = {
            entry.removeprefix(f"{name}.weight_quant."): value.reshape(-1, *[1] * (weight.dim() - 1))
            for entry, value in entries.items()
            if entry.startswith(f"{name}.weight_quant.")
        }
        found = value_of(quantizer, codes.reshape(weight.shape), own, bits, first)
        assert np.array_equal(found, layers[name].weight_quant(weight).detach().numpy()), name


def test_a_packed_network_is_a_module(tmp_path):
    """It can be copied, pickled, saved, loaded, folded, and packed again, to the same bytes."""
    model, config = trained(tmp_path, quantizer="proxq", bitW=4)
    path, again = tmp_path / "small.safetensors", tmp_path / "again.safetensors"
    write_packed(path, model, config, CLASSES)
    found, images = lifequant.load(path), torch.randn(2, 3, SIDE, SIDE)
    write_packed(again, found, config, CLASSES)
    assert again.read_bytes() == path.read_bytes()
    del found.preprocess  # a closure
    other = load_packed(path).model.eval()
    for name, buffer in other.named_buffers():
        if name.endswith("stored"):
            buffer.zero_()
    other.load_state_dict(found.state_dict())
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), other):
        assert torch.equal(twin(images), model(images))
    assert torch.equal(lifequant.fold_batchnorm(found)(images), lifequant.fold_batchnorm(model)(images))


class Odd(ResNet):
    """With buffers of other types that its logits depend on."""

    def __init__(self, num_classes: int, scheme: Scheme, shortcut: str) -> None:
        super().__init__(20, num_classes, scheme, shortcut)
        self.register_buffer("order", torch.arange(num_classes))
        self.register_buffer("gain", torch.ones((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:, self.order] * self.gain


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    """What is neither a code nor float32 keeps its type and its value."""
    registry.names("model")
    monkeypatch.setitem(registry._registered["model"], "odd", Odd)
    model, config = trained(tmp_path, target_model="odd")
    model.order.copy_(torch.tensor([3, 1, 0, 2, 5, 4]))
    model.gain.fill_(1 / 3)
    write_packed(tmp_path / "small.safetensors", model, config, CLASSES)
    found, images = lifequant.load(tmp_path / "small.safetensors"), torch.randn(2, 3, SIDE, SIDE)
    assert found.gain.dtype == torch.float64 and torch.equal(found(images), model(images))


def test_attention_counts_as_packed():
    """The in-projections of nn.MultiheadAttention at their bits, with a step each; biases in float32."""
    float_model = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True))
    model = lifequant.quantize_model(float_model, quantizer="lsq", weight_bits=4, act_bits=32, first_last_bits=4)
    values, biases = 4 * 16 * 16, 4 * 16  # query, key, value and output
    assert packed_model_bytes(model) == values // 2 + 4 * (biases + 2)


def test_values_that_need_more_than_codes(tmp_path, monkeypatch):
    """A quantizer whose values depend on the float weight, or a network that diverged, can't be packed."""
    model, config = trained(tmp_path, quantizer="lsq")
    target = tmp_path / "small.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(LSQWeight, "dequantize", lambda self, u, x: u * x.std())
        refused(lambda: write_packed(target, model, config, CLASSES), "conv1", "LSQWeight")
    model.bn1.weight.data[0] = float("nan")
    refused(lambda: write_packed(target, model, config, CLASSES), "bn1.weight")
    assert not target.exists()


def test_without_safetensors(tmp_path, monkeypatch):
    model, config = trained(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for work in (lambda: write_packed(tmp_path / "a.safetensors", model, config, CLASSES),
                 lambda: lifequant.load(tmp_path / "a.safetensors")):  # fmt: skip
        refused(work, 'pip install "lifequant[export]"')


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model, config = trained(tmp_path)
    path = tmp_path / "small.safetensors"
    write_packed(path, model, config, CLASSES)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed.checkpoint.os, "fsync", full)
    with pytest.raises(OSError):
        write_packed(path, model, config, CLASSES, accuracy=50.0)
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"model_best.pt", path.name}
