"""A small network and its packed file, taken apart without the library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from torch import nn

import lifequant
from lifequant import options
from lifequant.checkpointing import checkpoint
from lifequant.models.build import build
from lifequant.qat.calibration import calibrate_network
from support.tiny import CLASSES, SIDE


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
