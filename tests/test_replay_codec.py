"""--replay_codec: pixels and bytes against Pillow and numpy, and which images a run codes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import arguments, settings, train

from lifequant import options
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.data import codec
from lifequant.data.codec import CodedImages, decode, encode, label_bytes
from lifequant.data.dataset import load_dataset
from lifequant.data.task import Task


def by_pillow(path: Path, codec: str, quality: int) -> tuple[int, np.ndarray]:
    """(bytes, pixels [H, W, 3]) of an image file, straight through Pillow, or with the lower half of each byte cut off.

    The bytes are those of WebP's VP8 chunk without its header, or of a JPEG behind the header of its scan.
    """
    image = Image.open(path).convert("RGB")
    if codec == "bits4":
        pixels = np.asarray(image)
        return pixels.size // 2, np.round(pixels / 17).astype(np.uint8) * 17
    data = io.BytesIO()
    image.save(data, codec.upper(), quality=quality, **({"subsampling": 2} if codec == "jpeg" else {}))
    file = data.getvalue()
    if codec == "webp":
        size = int.from_bytes(file[16:20], "little")
    else:
        size = len(file) - file.index(b"\xff\xda\x00\x0c\x03") - 14  # two bytes of marker, twelve of header
    return size, np.asarray(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize(("codec", "quality"), [("webp", 50), ("webp", 90), ("jpeg", 50), ("bits4", None)])
def test_pixels_and_bytes(tiny, codec, quality):
    paths = sorted((tiny.images / "train").glob("*/0001.png"))
    images = torch.stack([torch.from_numpy(np.asarray(Image.open(p)).transpose(2, 0, 1).copy()) for p in paths])
    expected = [by_pillow(path, codec, quality or 0) for path in paths]
    rows = torch.tensor([1, 2, 5])
    coded = CodedImages(images, rows, codec, quality)
    found = coded.over(images[[0, 5, 2, 5]], torch.tensor([0, 5, 2, 5])).numpy().transpose(0, 2, 3, 1)
    assert np.array_equal(found[0], np.asarray(Image.open(paths[0])))  # not coded
    for place, row in ((1, 5), (2, 2), (3, 5)):
        assert np.array_equal(found[place], expected[row][1]) and not np.array_equal(found[place], images[row])
    assert coded.sizes_of(torch.tensor([5, 1])) == [expected[5][0], expected[1][0]]


def test_bits4_of_an_odd_number_of_values():
    pixels = np.arange(3 * 5 * 7, dtype=np.uint8).reshape(3, 5, 7) * 2
    data = encode(pixels, "bits4", None)
    assert len(data) == 53 and np.abs(decode(data, "bits4", None, (3, 5, 7)).astype(int) - pixels).max() == 8
    assert [label_bytes(n) for n in (2, 256, 257, 65536, 65537)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("new", [True, False])
def test_a_run(tiny, tmp_path, monkeypatch, new):
    """Stored images are coded, and new ones with --replay_code_new; test images are not. The bytes are the files' and the labels'."""
    taken: list[tuple[Task, torch.Tensor, torch.Tensor]] = []
    take = Task.take

    def watched(task: Task, rows: torch.Tensor, *more: Any) -> torch.Tensor:
        taken.append((task, rows, take(task, rows, *more)))
        return taken[-1][-1]

    monkeypatch.setattr(Task, "take", watched)
    flags = {"method": "derpp", "replay_codec": "webp", "replay_quality": 30, "replay_code_new": new, "nme": True}
    flags["replay_rate"] = 0.5
    found = train(tiny, tmp_path / "run", **flags)
    config = options.make(**settings(tiny, tmp_path / "run", **flags))
    data = load_dataset(config, torch.device("cpu"), print)
    expected = [by_pillow(tiny.images / path, "webp", 30) for path in data.train.paths]
    coded = 0
    for task, rows, pixels in taken:
        stored = set(task.replay.tolist())
        for row, image in zip(rows.tolist(), pixels, strict=True):
            raw = data.train.images[row].numpy().transpose(1, 2, 0)
            is_coded = new or row in stored
            coded += row in stored
            assert np.array_equal(image.numpy().transpose(1, 2, 0), expected[row][1] if is_coded else raw)
    stored = data.stored(1, config)
    assert coded > 16 and len(stored) == 16
    assert found["memory_bytes"]["replay"] == sum(expected[row][0] for row in stored) + 16
    assert found["versions"]["webp"] == codec.versions("webp")["webp"]
    assert found["config"]["replay_quality"] == 30 and found["average_accuracy_nme"] is not None


def test_another_encoder(tiny, tmp_path, monkeypatch, capsys):
    """A run goes on only with the encoder that it began with."""
    job = tmp_path / "run"
    train(tiny, job, method="replay", replay_codec="webp", num_tasks=1)
    assert checkpoint.read(job / "checkpoint" / "task0.pt", "run")["codec"] == codec.versions("webp")
    monkeypatch.setattr(codec.features, "version", lambda name: "9.9")
    argv = arguments(settings(tiny, tmp_path / "on", method="replay", replay_codec="webp", num_tasks=1))
    assert run_main(command, [*argv, "--resume", str(job / "checkpoint" / "task0.pt")]) == 2
    line = capsys.readouterr().err.strip()
    assert "its replay images were coded by webp" in line and "here is webp 9.9" in line and "\n" not in line
