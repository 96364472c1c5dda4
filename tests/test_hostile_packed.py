"""Packed files that others wrote: loaded, or refused in one line that names the file."""

from __future__ import annotations

import pickle
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hostile import changed_bytes, few, loads_or_refuses, refused
from support.packed import joined, parts, trained
from support.tiny import CLASSES

import lifequant
from lifequant.checkpointing.packed import write_packed
from lifequant.common.errors import UserError


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
