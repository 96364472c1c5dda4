"""``lifequant predict`` and examples/deploy.py: the same classes from a run, a packed file, an ONNX file, with and without torch."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from support.tiny import CLASSES, SIDE, train

import lifequant
from lifequant import options
from lifequant.__main__ import command
from lifequant.checkpointing.packed import write_packed
from lifequant.common.arguments import run_main

DEPLOY = Path(__file__).resolve().parents[1] / "examples" / "deploy.py"


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory) -> Path:
    """A run and, in its folder, its packed file."""
    job = tmp_path_factory.mktemp("predict") / "run"
    train(tiny, job, num_tasks=1, quantizer="lsq")
    config = options.make(quantizer="lsq", image_size=SIDE)
    write_packed(job / "small.safetensors", lifequant.load(job), config, CLASSES)
    return job


def graph(path: Path, size: int = 8, names: object = ("red", "green", "blue"), **other: object) -> Path:
    """An ONNX file whose logits are the means of the three colors, / 32; ``other`` departs from what is exported."""
    given = {
        "input": "images",
        "type": TensorProto.UINT8,
        "shape": ["n", 3, size, size],
        "output": "logits",
        "classes": 3,
    }
    given |= other
    nodes = [
        helper.make_node("Cast", [given["input"]], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Div", ["mean", "by"], [given["output"]]),
    ]
    inputs = [helper.make_tensor_value_info(given["input"], given["type"], given["shape"])]
    outputs = [helper.make_tensor_value_info(given["output"], TensorProto.FLOAT, [given["shape"][0], given["classes"]])]
    by = helper.make_tensor("by", TensorProto.FLOAT, [], [32.0])
    model = helper.make_model(
        helper.make_graph(nodes, "colors", inputs, outputs, [by]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    if names is not None:
        entry = model.metadata_props.add()
        entry.key, entry.value = "class_names", names if isinstance(names, str) else json.dumps(names)
    if "resize" in given:
        entry = model.metadata_props.add()
        entry.key, entry.value = "resize", json.dumps(given["resize"])
    onnx.save(model, path)
    return path


def predict(capsys, *words: object, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of the verb."""
    capsys.readouterr()
    assert run_main(command, ["predict", *map(str, words)]) == code
    return capsys.readouterr()


def refused(capsys, *words: object) -> str:
    """The one line that it prints."""
    out, error = predict(capsys, *words, code=2)
    assert out == "" and error.startswith("lifequant: error: ") and error.count("\n") == 1 and len(error) < 1000
    return error


def test_a_folder(job, tiny, tmp_path, capsys):
    """All images below it, in batches, as the model itself sees them one by one; the packed file says the same."""
    table = tmp_path / "new" / "out.csv"
    out, _ = predict(capsys, job, tiny.images / "test", "--csv", table, "--topk", 3, "--batch_size", 5)
    rows = list(csv.reader(table.read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["path", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    files = sorted((tiny.images / "test").rglob("*.png"))
    model, right = lifequant.load(job), 0
    assert [row[0] for row in rows[1:]] == list(map(str, files)) and len(files) == 24
    for file, (_, *cells) in zip(files, rows[1:], strict=True):
        with torch.no_grad():
            shares = model(model.preprocess(file))[0].softmax(0)
        order = shares.argsort(descending=True)[:3].tolist()
        assert cells[::2] == [CLASSES[label] for label in order]
        assert list(map(float, cells[1::2])) == pytest.approx(shares[order].tolist(), abs=2e-6)
        right += cells[0] == file.parent.name
    assert f"24 images: {table}\naccuracy: {100 * right / 24:.2f} % ({right} of 24 images" in out
    printed, _ = predict(capsys, job / "small.safetensors", tiny.images / "test", "--topk", 1)
    lines = printed.splitlines()
    assert len(lines) == 25 and lines[-1] == out.splitlines()[-1]
    assert lines[0].startswith(f"{files[0]}: {rows[1][1]} ") and lines[0].endswith(" %")
    one, _ = predict(capsys, job / "model_best.pt", files[0])
    assert one.count("\n") == 1 and one.count(" %") == 5  # images that are named themselves have no accuracy


def test_unreadable_images(job, tiny, tmp_path, capsys):
    """Left out of a folder, counted and named in a line at the end; an error where named itself."""
    top = tmp_path / "images"
    (top / "below" / ".hidden").mkdir(parents=True)
    good = Image.new("RGB", (20, 30), "red")
    good.save(top / "a.png")
    good.save(top / "below" / "b.dat", format="JPEG")
    good.save(top / "below" / ".hidden" / "c.png")
    (top / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (top / "notes.txt").write_text("no picture")
    os.symlink(top, top / "below" / "circle")
    os.mkfifo(top / "pipe.png")
    out, error = predict(capsys, job, top)
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(top / "a.png"), str(top / "below" / "b.dat")]
    assert error == (
        f"lifequant: images that can't be read and are left out: 2 ({top / 'broken.jpg'}, {top / 'pipe.png'})\n"
    )
    assert "broken.jpg" in refused(capsys, job, top / "broken.jpg")
    assert "no such file" in refused(capsys, job, top / "none.png")
    (top / "empty").mkdir()
    assert "no images in this folder" in refused(capsys, job, top / "empty")
    (top / "empty" / "x.png").touch()
    assert "x.png" in refused(capsys, job, top / "empty")
    assert "is a folder" in refused(capsys, job, top / "a.png", "--csv", top)
    assert "--topk" in refused(capsys, job, top / "a.png", "--topk", 0)
    assert "no such model" in refused(capsys, top, top / "a.png")
    assert "IMAGE" in refused(capsys, job)


def test_onnx(tmp_path, capsys):
    """By onnxruntime; the logits are means of colors of the middle of the image."""
    model = graph(tmp_path / "colors.onnx")
    pixels = np.zeros((8, 20, 3), np.uint8)
    pixels[:, :6] = 255, 0, 0
    pixels[:, 6:14] = 32, 128, 64
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    out, _ = predict(capsys, model, tmp_path / "wide.png")
    shares = np.exp([4.0, 2.0, 1.0]) / np.exp([4.0, 2.0, 1.0]).sum() * 100
    assert out == f"{tmp_path / 'wide.png'}: green {shares[0]:.1f} %, blue {shares[1]:.1f} %, red {shares[2]:.1f} %\n"


WRONG = {
    "another input": {"input": "x"}, "float pixels": {"type": TensorProto.FLOAT}, "one image": {"shape": [1, 3, 8, 8]},
    "any size": {"shape": ["n", 3, "h", "w"]}, "not square": {"shape": ["n", 3, 8, 9]}, "gray": {"shape": ["n", 1, 8, 8]},
    "another output": {"output": "y"}, "no names": {"names": None}, "two names": {"names": ["a", "b"]},
    "numbers": {"names": [1, 2, 3]}, "no JSON": {"names": "red"}, "deep": {"names": "[" * 10**5}, "no list": {"names": {"a": 1}},
    "smaller": {"resize": 7}, "huge": {"resize": 10**9}, "text": {"resize": "9"},
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_onnx_of_others(wrong, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    model = graph(tmp_path / "other.onnx", **wrong)
    assert f"{model}: not as lifequant export writes it" in refused(capsys, model, tmp_path / "a.png")


def test_broken_onnx(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "bad.onnx"
    assert "no such model" in refused(capsys, path, tmp_path / "a.png")
    whole = graph(tmp_path / "good.onnx").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole.replace(b"ReduceMean", b"ReduceMeen")):
        path.write_bytes(content)
        assert "bad.onnx" in refused(capsys, path, tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert 'pip install "lifequant[export]"' in refused(capsys, tmp_path / "good.onnx", tmp_path / "a.png")


def test_deploy(tmp_path, capsys):
    """The example imports neither torch nor lifequant, and says of images of other sizes and kinds what the verb says."""
    model = graph(tmp_path / "colors.onnx", size=16)
    noise = np.random.default_rng(0)
    tall, turned = (Image.fromarray(noise.integers(0, 256, (48, 40, 3), np.uint8)) for _ in range(2))
    exif = turned.getexif()
    exif[0x0112] = 6
    tall.save(tmp_path / "tall.png")
    tall.convert("P").save(tmp_path / "palette.gif")
    tall.resize((16, 16)).convert("L").save(tmp_path / "gray.bmp")
    turned.save(tmp_path / "turned.jpg", exif=exif)
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({str(DEPLOY)!r}, run_name='__main__'); \
        assert not {{'torch', 'lifequant'}} & set(sys.modules)"
    for image in (tmp_path / name for name in ("tall.png", "palette.gif", "gray.bmp", "turned.jpg")):
        words = [sys.executable, "-I", "-c", code, str(DEPLOY), str(model), str(image)]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ours, _ = predict(capsys, model, image)
        theirs = [line.split(" %  ") for line in done.stdout.splitlines()]
        assert ours == f"{image}: " + ", ".join(f"{name} {share.strip()} %" for share, name in theirs) + "\n"


def test_deploy_of_photographs(tmp_path, capsys):
    """After --augment reference the middle of a larger image is taken: by Pillow in the example, by torch in the verb."""
    model = graph(tmp_path / "colors.onnx", size=14, resize=16)
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :14] = pixels[:, 50:] = (
        255,
        0,
        0,
    )  # 1/16 of the height at each side of the square in the middle is cut off
    pixels[4:44, 14:50] = 0, 128, 64
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    words = [sys.executable, str(DEPLOY), str(model), str(tmp_path / "wide.png")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = {line.split(" %  ")[1]: float(line.split(" %  ")[0]) for line in done.stdout.splitlines()}
    ours, _ = predict(capsys, model, tmp_path / "wide.png")
    for part in ours.split(": ")[1].split(", "):
        name, share, _ = part.split()
        assert theirs[name] == pytest.approx(float(share), abs=0.5)
    middle = pixels[3:45, 11:53].mean((0, 1)) / 32
    shares = 100 * np.exp(middle) / np.exp(middle).sum()
    assert [theirs[name] for name in ("red", "green", "blue")] == pytest.approx(shares, abs=3)
