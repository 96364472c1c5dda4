"""Packed files: the bit stream against integers of Python, the network against the one that was trained, to the bit."""

from __future__ import annotations

import copy
import json
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hostile import changed_bytes, few, loads_or_refuses, refused
from support.tiny import CLASSES, SIDE, train
from torch import nn

import lifequant
from lifequant import options, registry
from lifequant.checkpointing import checkpoint, packed
from lifequant.checkpointing.packed import load_packed, write_packed
from lifequant.common.errors import UserError
from lifequant.models.build import build
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.layers import weight_layers
from lifequant.qat.packing import pack_codes, packed_model_bytes, unpack_codes
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


def trained(folder: Path, classes: int = 6, **settings) -> tuple[nn.Module, options.Config]:
    """The model that lifequant.load gives of a model_best.pt: calibrated on images, BatchNorm with statistics of its own."""
    config = options.make(image_size=SIDE, **settings)
    model = build(config, classes)
    torch.manual_seed(1)
    calibrate_network(model, torch.randn(4, 3, SIDE, SIDE))
    model.train()(torch.randn(4, 3, SIDE, SIDE) + 0.3)
    names = CLASSES[:classes] if classes <= len(CLASSES) else [f"class {i}" for i in range(classes)]
    checkpoint.write(folder / "model_best.pt", checkpoint.model_state(config, model, names))
    return lifequant.load(folder), config


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


def parts(content: bytes) -> tuple[dict, dict, bytes]:
    """(the header, LifeQuant's metadata, the data) of a safetensors file, without the library."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["lifequant_packed"]), content[8 + length :]


def joined(header: dict, ours: object, data: bytes) -> bytes:
    """A file with another header or other metadata."""
    header = {**header, "__metadata__": {"lifequant_packed": ours if isinstance(ours, str) else json.dumps(ours)}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_read_by_numpy_alone(tmp_path):
    """As docs describe the file: codes by numpy.unpackbits, and what follows in the order of the state dict."""
    model, config = trained(tmp_path, quantizer="lsq", bitW=3)
    write_packed(tmp_path / "small.safetensors", model, config, CLASSES)
    header, ours, data = parts((tmp_path / "small.safetensors").read_bytes())
    assert ours["network"] == {"quantizer": "lsq", "bitW": 3} and ours["class_names"] == CLASSES
    layers = dict(weight_layers(model))
    assert header.keys() - {"__metadata__", ".rest"} == ours["codes"].keys() == layers.keys()
    for name, (bits, first) in ours["codes"].items():
        start, stop = header[name]["data_offsets"]
        stream = np.unpackbits(np.frombuffer(data[start:stop], np.uint8), bitorder="little")
        weight, quant = layers[name].weight, layers[name].weight_quant
        codes = stream[: bits * weight.numel()].reshape(-1, bits) @ (1 << np.arange(bits)) + first
        step = quant.step_size.detach().numpy()
        assert np.array_equal(codes.reshape(weight.shape).astype(np.float32) * step, quant(weight).detach().numpy())
    start, stop = header[".rest"]["data_offsets"]
    rest = np.frombuffer(data[start:stop], "<f4")
    of_weights = {f"{name}.weight" for name in layers}
    kept = [v for n, v in model.state_dict().items() if n not in of_weights and not n.endswith("num_batches_tracked")]
    assert np.array_equal(rest, np.concatenate([value.numpy().ravel() for value in kept]))


def test_a_packed_network_is_a_module(tmp_path):
    """It can be copied, pickled, saved, loaded, and packed again, to the same bytes."""
    model, config = trained(tmp_path, quantizer="apot", bitW=4)
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


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("packed")
    model, config = trained(folder, quantizer="uniform", bitW=2, layer_bits="layer1.0.conv1=32/2")
    write_packed(folder / "small.safetensors", model, config, CLASSES)
    return (folder / "small.safetensors").read_bytes()


OTHERS = [
    ("format", 2), ("format", "1"), ("network", []), ("network", {"quantizer": "x"}), ("network", {"quantizer": {}}),
    ("network", {"quantizer": "uniform", "bitW": 7}), ("network", {"quantizer": "uniform", "layer_bits": "*"}),
    ("network", {}), ("network", {"quantizer": "uniform", "target_model": "resnet56"}), ("codes", {}), ("codes", [1]),
    ("codes", {"conv1": [2, 0]}), ("class_names", []), ("class_names", [1]), ("class_names", ["a"] * 200_000),
    ("class_names", ["a"] * 7), ("image_size", 10**9), ("image_size", True), ("image_size", "16"), ("mean", [0, 0, 0]),
    ("std", None), ("facts", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OTHERS, ids=lambda x: str(x)[:40])
def test_other_metadata(name, value, content, tmp_path):
    header, ours, data = parts(content)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(joined(header, {**ours, name: value}, data))
    refused(lambda: lifequant.load(path), "bad.safetensors")
    ours.pop(name)
    path.write_bytes(joined(header, ours, data))
    refused(lambda: lifequant.load(path), "bad.safetensors")


def test_other_seeds_are_the_same_network(content, tmp_path):
    header, ours, data = parts(content)
    ours["network"]["seed"] = 10**30
    (tmp_path / "a.safetensors").write_bytes(joined(header, ours, data))
    lifequant.load(tmp_path / "a.safetensors")


def test_broken_files(content, tmp_path):
    """Cut, of another kind, with a huge header, without a tensor, with one of another shape or type, with other codes."""
    header, ours, data = parts(content)
    text = {name: value for name, value in header.items() if name != "__metadata__"}
    bits, first = ours["codes"]["fc"]
    end = header["fc"]["data_offsets"][1]
    cases = {
        "empty": b"", "short": content[:7], "cut": content[:-1], "text": b"text" * 100, "pickle": pickle.dumps([1] * 99),
        "huge header": struct.pack("<Q", 2**40) + content[8:], "longest header": b"\xff" * 8 + content[8:],
        "big header": struct.pack("<Q", 2**26) + b" " * 2**26 + data,
        "foreign": struct.pack("<Q", 8) + b"{}      ", "no JSON": joined(text, "{", data), "a list": joined(text, "[]", data),
        "deep": joined(text, "[" * 10**5, data), "no codes": joined({n: v for n, v in text.items() if n != "fc"}, ours, data),
        "renamed": joined({"fd" if n == "fc" else n: v for n, v in text.items()}, ours, data),
        "reshaped": joined(text | {"fc": text["fc"] | {"shape": [end - text["fc"]["data_offsets"][0], 1]}}, ours, data),
        "of another type": joined(text | {"fc": text["fc"] | {"dtype": "I8"}}, ours, data),
        "longer": joined(text | {"more": {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}}, ours, data + b"1"),
        "odd bits": joined(text, ours | {"codes": ours["codes"] | {"fc": [bits + 1, first]}}, data),
        "no bits": joined(text, ours | {"codes": ours["codes"] | {"fc": [10**9, first]}}, data),
        "a far code": joined(text, ours | {"codes": ours["codes"] | {"fc": [bits, 2**40]}}, data),
        "a text": joined(text, ours | {"codes": ours["codes"] | {"fc": "ab"}}, data),
    }  # fmt: skip
    path = tmp_path / "bad.safetensors"
    for name, bad in cases.items():
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"bad\.safetensors") as error:
            lifequant.load(path)
        assert len(str(error.value)) < 1000, name
    refused(lambda: lifequant.load(tmp_path / "none.safetensors"), "none.safetensors", "No such file")
    (tmp_path / "folder.safetensors").mkdir()
    refused(lambda: lifequant.load(tmp_path / "folder.safetensors"), "not a regular file")


def test_a_code_beyond_the_last(tmp_path):
    """ProxQ's codes are -7 .. 7; 8 would be another value."""
    model, config = trained(tmp_path, quantizer="proxq", bitW=4)
    path = tmp_path / "bad.safetensors"
    write_packed(path, model, config, CLASSES)
    header, ours, data = parts(path.read_bytes())
    start = header["layer1.0.conv1"]["data_offsets"][0]
    path.write_bytes(joined(header, ours, data[:start] + b"\x0f" + data[start + 1 :]))
    refused(lambda: lifequant.load(path), "layer1.0.conv1", "the code 8")


@given(data=st.data())
@settings(few, max_examples=50)
def test_changed_bytes(data, content, tmp_path):
    path = tmp_path / "changed.safetensors"
    path.write_bytes(data.draw(changed_bytes(content)))
    loads_or_refuses(lambda: lifequant.load(path))


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
