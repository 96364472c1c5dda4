"""Runs on images that stay encoded: the same bits from every place, resumed, refused, ahead of the step, predicted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from support.equal import read, same
from support.photographs import REFERENCE, SIDE, files, opened, seeded
from support.tiny import Tiny, arguments, settings, train

import lifequant
from lifequant import options
from lifequant.__main__ import command
from lifequant.__main__ import train as train_command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.data import ahead as ahead_module
from lifequant.data import dataset, image_stores
from lifequant.data.ahead import ahead
from lifequant.data.image_storage import choose_location
from lifequant.data.photographs import EncodedImages

CPU = torch.device("cpu")


@pytest.mark.parametrize("flags", [REFERENCE, {"augment": "resized_crop", "image_size": SIDE}])
def test_runs_from_every_place(photos, tmp_path, flags, capsys):
    """The same weights and results, whatever --cache says; --test_only finds the accuracy of the run."""
    places = ["memory", "encoded"] + ["mmap"] * (flags != REFERENCE)
    more = {"method": "derpp", "nme": True, "num_epochs": 1, "val_fraction": 0.2, "bn_reestimate": 2, "head_epochs": 1}
    for place in places:
        train(photos, tmp_path / place, cache=place, cache_dir=tmp_path / "cache", **flags, **more)
    for place in places[1:]:
        found, other = (read(tmp_path / name) for name in (places[0], place))
        for results in (found, other):
            del results["config"]["cache"]
        same(found, other)
        states = [checkpoint.read(tmp_path / name / "model_best.pt", "model")["model"] for name in (places[0], place)]
        same(*states)
    capsys.readouterr()
    words = [
        "--test_only",
        "--job_dir",
        str(tmp_path / "encoded"),
        "--cache_dir",
        str(tmp_path / "cache"),
        "--device",
        "cpu",
    ]
    assert train_command(words) == 0
    top1 = read(tmp_path / "encoded")["top1"][-1]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("task ")]
    assert [float(row[2]) for row in rows] == pytest.approx(top1, abs=0.005)


def test_killed_and_resumed(photos, tmp_path):
    """By SIGKILL within a task, with batches made ahead: it ends as if nothing had been."""
    argv = arguments(
        settings(photos, tmp_path / "run", method="derpp", cache="encoded", checkpoint_seconds=0, **REFERENCE)
    )
    straight = [*argv, "--job_dir", str(tmp_path / "straight")]
    assert train_command(straight) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIFEQUANT_FAULT": "rename:3"}
    words = [sys.executable, "-m", "lifequant", *argv]
    done = subprocess.run(words, env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.read(tmp_path / "run" / "checkpoint" / "previous.pt", "run")["step"] > 0
    assert train_command([*argv, "--resume", "True"]) == 0
    same(read(tmp_path / "run"), read(tmp_path / "straight"))
    for name, kind in (("last.pt", "run"), ("task0.pt", "run"), ("model_best.pt", "model")):
        same(*(checkpoint.read(tmp_path / job / "checkpoint" / name, kind) for job in ("run", "straight")), name)


def test_broken_photograph(photos, tmp_path, capsys):
    """Found when the run begins, in one line; and in the middle of a run, if the file breaks then."""
    images = shutil.copytree(photos.images, tmp_path / "images")
    broken = images / "train/ant/0000_plain.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    for flags in (REFERENCE, {"image_size": 72}):
        words = arguments(settings(Tiny(images, photos.csvs, photos.csvs), tmp_path / "run", cache="encoded", **flags))
        assert run_main(train_command, words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"lifequant: error: {broken}: this image can't be read") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    store = EncodedImages(images, files(photos), SIDE, held=False)
    with pytest.raises(UserError, match=r"0000_plain\.jpg: this image can't be read"):
        next(ahead(lambda rows: store[rows], [torch.tensor([1, 0])]))
    Image.new("RGB", (30, 30)).save(broken)
    whole = opened(photos, held=False)
    whole.files[0] = broken
    with pytest.raises(UserError, match="has changed since the run began"):
        whole.crops(torch.arange(2), seeded())


def test_checked_once(photos, tmp_path, monkeypatch, capsys):
    """The second run knows the sizes; ``lifequant cache`` lists them. A damaged file is made anew."""
    config = options.make(**settings(photos, tmp_path, cache_dir=tmp_path / "cache", cache="encoded", **REFERENCE))
    said: list[str] = []
    first = dataset.load_dataset(config, CPU, said.append)
    assert (
        "6 of 48 images were converted: CMYK to RGB" in said
        and "6 of 48 images were converted: turned as EXIF says" in said
    )
    monkeypatch.setattr(image_stores, "decode_whole", None)  # not to be called
    second = dataset.load_dataset(config, CPU, said.append)
    assert torch.equal(first.train.images.sizes, second.train.images.sizes)
    monkeypatch.undo()
    for path in (tmp_path / "cache").glob("*.npy"):
        path.write_bytes(b"damaged")
    third = dataset.load_dataset(config, CPU, said.append)
    assert torch.equal(first.test.images.sizes, third.test.images.sizes)
    capsys.readouterr()
    assert run_main(command, ["cache", "--cache_dir", str(tmp_path / "cache")]) == 0
    assert "sizes of 48 images" in capsys.readouterr().out


def test_what_fits(monkeypatch):
    """auto: decoded in memory, else encoded in memory, else decoded in a file; photographs are never decoded to a file."""
    monkeypatch.setattr("lifequant.data.image_storage.available_bytes", lambda: 1000)
    said: list[str] = []

    def chosen(cache: str, decoded: int, encoded: int, whole: bool = False) -> tuple[bool, bool, bool]:
        where = choose_location(cache, decoded, CPU, said.append, encoded, whole)
        return where.encoded, where.held, where.mapped

    assert chosen("auto", 500, 100) == (False, False, False) and not said
    assert chosen("auto", 501, 500) == (True, True, False) and "--cache auto: encoded" in said[-1]
    assert chosen("auto", 501, 501) == (False, False, True) and "--cache auto: mmap" in said[-1]
    assert chosen("auto", 501, 501, True) == (True, False, False) and "are read batch by batch" in said[-1]
    assert chosen("encoded", 1, 500) == (True, True, False)
    assert chosen("memory", 501, 1, True) == (False, False, False)
    with pytest.raises(UserError, match=r"--cache mmap: .*use encoded or auto"):
        options.make(augment="reference", cache="mmap")
    assert options.make(augment="reference").crop_scale == 0.08 and options.make().crop_scale == 0.35


def test_ahead():
    """In order, two ahead, in one thread that takes one core; errors arrive where the result is asked for."""
    seen: list[int] = []
    threads = torch.get_num_threads()

    def make(item: int) -> tuple[int, int]:
        if item == 4:
            raise UserError("four")
        return item, torch.get_num_threads()

    def items():
        for item in range(9):
            seen.append(item)
            yield item

    made = ahead(make, items())
    assert next(made) == (0, 1) and seen == list(range(1 + ahead_module.AHEAD))
    assert [next(made)[0] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="four"):
        next(made)
    assert torch.get_num_threads() == threads and list(ahead(str, range(3))) == ["0", "1", "2"]


def test_large_images_ahead(photos, tmp_path):
    """Decoded images of more than 64 pixels are augmented by the thread: the batches are those of no thread."""
    config = options.make(**settings(photos, tmp_path, cache_dir=tmp_path / "cache", image_size=72))
    task = dataset.load_dataset(config, CPU, lambda line: None).task(0, config)
    epoch = task.epoch(torch.randperm(len(task.pool), generator=seeded()), 8)
    draws = [(epoch, index, seeded(index)) for index in range(4)]
    assert ahead_module.pays(task.images, CPU) and not isinstance(task.images, EncodedImages)
    for batch, (_, index, _) in zip(task.training_batches(iter(draws)), draws, strict=True):
        assert all(map(torch.equal, batch[:4], task.training_batch(epoch, index, seeded(index))[:4]))


def test_predictions(photos, tmp_path, capsys):
    """A loaded model, its packed file and ``lifequant predict`` see a photograph as the run's evaluation did."""
    job, cache = tmp_path / "run", tmp_path / "cache"
    found = train(photos, job, num_tasks=1, method="original", quantizer="lsq", cache_dir=cache, **REFERENCE)
    config = options.make(**settings(photos, job, cache_dir=cache, num_tasks=1, **REFERENCE))
    store = dataset.load_dataset(config, CPU, lambda line: None).test
    (seen,) = store.batches([torch.arange(len(store.paths))])
    assert run_main(command, ["export", str(job), "--format", "packed"]) == 0
    (packed,) = job.glob("*.safetensors")
    for model in (lifequant.load(job), lifequant.load(packed)):
        assert (model.image_size, model.resize) == (SIDE, 27)
        assert torch.equal(torch.cat([model.preprocess(photos.images / path) for path in store.paths]), seen)
        with torch.inference_mode():
            right = (model(seen).argmax(1) == store.labels).double().mean()
        assert found["top1"][0][0] == pytest.approx(100 * right.item())
    capsys.readouterr()
    assert run_main(command, ["predict", str(packed), *(str(photos.images / path) for path in store.paths)]) == 0
    names = [line.split(": ")[1].split(" ")[0] for line in capsys.readouterr().out.splitlines()[: len(store.paths)]]
    with torch.inference_mode():
        assert names == [model.class_names[label] for label in model(seen).argmax(1)]
