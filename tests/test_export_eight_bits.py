"""Exported networks of 8 bits, whose products are too large for some of onnxruntime's kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_export import QUANTIZERS, calibrated_branches
from torch import nn

import lifequant
from lifequant.exporting import api, run

onnx = pytest.importorskip("onnx")


def test_eight_bits_times_eight_bits(tmp_path):
    """onnxruntime's kernels for int8 weights add two products in 16 bits on a CPU without VNNI: those that could be too
    large for it are unsigned, for which its kernels have 32 bits."""
    q, x = calibrated_branches(8)
    api.export(q, tmp_path / "q.onnx", x[:4], "fast", "int8", [x])
    with torch.no_grad():
        expected = q(x).numpy().reshape(len(x), len(QUANTIZERS), -1)
    given = run.outputs((tmp_path / "q.onnx").read_bytes(), [x.numpy()]).reshape(expected.shape)
    error = np.sqrt(((given - expected) ** 2).mean((0, 2))) / expected.std((0, 2))
    assert dict(zip(QUANTIZERS, error > 0.08, strict=True)) == dict.fromkeys(QUANTIZERS, False), error
    for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer:
        codes = onnx.numpy_helper.to_array(tensor)
        if codes.ndim == 4 and codes.dtype == np.int8:
            assert abs(codes.astype(int)).max() * 255 * 2 < 2**15


def test_a_linear_layer_of_eight_bits(tmp_path):
    """The same of a product, with inputs and weights near their largest codes."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    for parameter in net.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) / 2 + 0.5
    x = torch.rand(64, 3, 4, 4, generator=generator)
    q = lifequant.quantize_model(net, act_bits=8)
    lifequant.calibrate(q, [x])
    with torch.no_grad():
        expected = q.eval()(x).numpy()
    for form in ("exact", "fast"):
        api.export(q, tmp_path / f"{form}.onnx", x[:4], form, "int8", [x])
        given = run.outputs((tmp_path / f"{form}.onnx").read_bytes(), [x.numpy()])
        assert np.abs(given - expected).max() < 0.01 * expected.mean(), form
