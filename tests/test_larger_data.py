"""Images that needn't fit memory, and images that are large: the mapped cache, resized crops, folders of domains."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.equal import TIMES
from support.tiny import SIDE, Tiny, arguments, settings, train
from torchvision.transforms import functional as reference

from lifequant import options, registry
from lifequant.common.errors import UserError
from lifequant.common.safe_files import stats_inside
from lifequant.data import dataset, image_cache, image_storage
from lifequant.data.augment import augmentation, crop_and_flip, random_boxes, resized_crop_and_flip
from lifequant.data.create.tasks import main_tasks
from lifequant.data.replay import epoch_order

CPU = torch.device("cpu")


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loaded(tiny: Tiny, **more) -> tuple[options.Config, dataset.DataSet]:
    config = options.make(**settings(tiny, Path("unused"), **more))
    return config, dataset.load_dataset(config, CPU, lambda line: None)


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_batches_of_a_mapped_cache(tiny, augment):
    """Bit for bit those of images in memory; the tensor is the file's, not a copy."""
    seen = []
    for cache in ("memory", "mmap"):
        config, found = loaded(tiny, cache=cache, augment=augment)
        assert hasattr(found.train.images, "mapping") == hasattr(found.test.images, "mapping") == (cache == "mmap")
        task = found.task(1, config, registry.method(config.method).joint)
        order = epoch_order(task.labels[task.pool], task.counts, "uniform", seeded())
        epoch = task.epoch(order, 8)
        batches = [task.training_batch(epoch, step, seeded(step)) for step in range(3)]
        seen.append([*(value for batch in batches for value in batch[:4]), *task.batch(task.replay)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_runs_of_a_mapped_cache(tiny, tmp_path):
    """The same weights and results, and a run goes on from the one with the other."""
    kept = []
    for cache in ("memory", "mmap"):
        flags = {"method": "derpp", "nme": True, "num_epochs": 1, "cache": cache}
        found = train(tiny, tmp_path / cache, **flags)
        state = torch.load(tmp_path / cache / "model_best.pt", weights_only=True)["model"]
        numbers = {name: value for name, value in found.items() if name not in TIMES}
        numbers["config"] = {name: value for name, value in numbers["config"].items() if name != "cache"}
        kept.append((numbers, state))
    (numbers, state), (others, other) = kept
    assert numbers == others and numbers["memory_bytes"]["replay"] > 0
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    again = train(tiny, tmp_path / "memory", method="derpp", nme=True, num_epochs=1, cache="mmap", resume=True)
    assert again["top1"] == numbers["top1"]


def test_auto(monkeypatch):
    """mmap where the images take more than half of the available memory, which is said."""
    said: list[str] = []
    assert 0 < image_storage.available_bytes() < 1 << 50
    monkeypatch.setattr(image_storage, "available_bytes", lambda: 1000)
    assert not image_storage.choose_location("auto", 500, CPU, said.append).mapped and not said
    assert image_storage.choose_location("auto", 501, CPU, said.append).mapped and "--cache auto: mmap" in said[0]
    assert not image_storage.choose_location("memory", 501, CPU, said.append).mapped
    assert image_storage.choose_location("mmap", 1, CPU, said.append).mapped
    monkeypatch.setattr(image_storage, "available_bytes", lambda: None)
    assert not image_storage.choose_location("auto", 1 << 60, CPU, said.append).mapped and len(said) == 1


def test_container_limit(tmp_path, monkeypatch):
    """A container's limit counts, less what is used and can't be given back; "max" is none."""
    monkeypatch.setattr(image_storage, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert image_storage.available_bytes() > 1_000_000
    (tmp_path / "memory.max").write_text("1000000\n")
    assert image_storage.available_bytes() == 400_000


def test_mapped_cache_that_cannot_be_written(tiny, tmp_path):
    """There is nothing that could be mapped, and what doesn't fit memory must not be put there."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"--cache mmap: the image cache .* can't be written .*--cache_dir"):
        loaded(tiny, cache="mmap", cache_dir=tmp_path / "file" / "cache")
    _, found = loaded(tiny, cache="auto", cache_dir=tmp_path / "file" / "cache")
    assert not hasattr(found.train.images, "mapping")


@pytest.mark.parametrize("mapped", [False, True])
def test_full_disk(mapped, tiny, tmp_path, monkeypatch):
    """Known before anything is decoded; no file is left."""
    names = [path.relative_to(tiny.images).as_posix() for path in sorted(tiny.images.glob("train/ant/*"))]
    usage = image_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    said: list[str] = []
    call = (tiny.images, names, SIDE, tmp_path / "cache", "x", said.append, mapped)
    if mapped:
        with pytest.raises(UserError, match="No space left"):
            image_cache.load_images(*call)
    else:
        assert len(image_cache.load_images(*call)) == len(names) and "No space left" in said[0]
    assert not list((tmp_path / "cache").iterdir())


BUILD = """
import sys, time
from pathlib import Path
from lifequant.data import image_cache as images
decode = images.decode
def slow(path, size):
    if path.name.startswith("0003"):
        print("there", flush=True)
        time.sleep(60)
    return decode(path, size)
images.decode = slow
images._AHEAD = 0
images.load_images(Path(sys.argv[1]), sys.argv[3:], 16, Path(sys.argv[2]), "x", print)
"""


def test_killed_build(tiny, tmp_path):
    """Two want the same cache: one builds, the other says whom it waits for. The one is killed: the other builds.

    Nothing lies under the final name meanwhile, and what the killed one left is cleared.
    """
    names = [path.relative_to(tiny.images).as_posix() for path in sorted(tiny.images.glob("train/ant/*"))]
    cache = tmp_path / "cache"
    top = str(Path(image_cache.__file__).parents[2])
    command = [sys.executable, "-c", BUILD, str(tiny.images), str(cache), *names]
    builds = []
    try:
        for said in ("there", "waiting for process {} on "):
            builds.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": top}, text=True)
            )
            assert builds[-1].stdout.readline().startswith(said.format(builds[0].pid))
        (left,) = cache.glob("*.npy.part")
        assert len(list(cache.iterdir())) == 3  # and the lock and its owner's name
        builds[0].send_signal(signal.SIGKILL)
        builds[0].wait()
        assert builds[1].stdout.readline() == "there\n"
        assert left.exists()
        builds[1].send_signal(signal.SIGKILL)
        builds[1].wait()
        found = image_cache.load_images(tiny.images, names, SIDE, cache, "x", print, True)
        (file,) = cache.iterdir()
    finally:
        for build in builds:
            build.kill()
            build.wait()
            build.stdout.close()
    for name, pixels in zip(names, found.numpy(), strict=True):
        assert (pixels == np.asarray(Image.open(tiny.images / name)).transpose(2, 0, 1)).all()
    assert (np.load(file) == found.numpy()).all()  # numpy's own reader


@pytest.mark.parametrize(("side", "least"), [(24, 0.08), (65, 0.35)])
def test_resized_crop(side, least):
    """torchvision's resized_crop of each image, bilinear, within one level of 255: rows are rounded before columns."""
    pixels = torch.randint(0, 256, (40, 3, side, side), dtype=torch.uint8, generator=seeded(1))
    found = resized_crop_and_flip(pixels, seeded(), least)
    boxes, mirrored = random_boxes(40, side, side, seeded(), least)
    errors = []
    for image, box, flip, after in zip(pixels, boxes.tolist(), mirrored, found, strict=True):
        expected = reference.resized_crop(image.float(), *box, [side, side], antialias=False)
        errors.append((reference.hflip(expected) if flip else expected) - after.float())
    errors = torch.stack(errors)
    assert errors.abs().max() < 1.01 and errors.abs().mean() < 0.4 and errors.mean().abs() < 0.1
    assert found.dtype == torch.uint8 and 10 < mirrored.sum() < 30


def test_boxes():
    """Inside the image, of the areas and shapes that are asked for, as often as it should be; the whole where none fits."""
    boxes, mirrored = random_boxes(4000, 224, 224, seeded(), 0.35)
    top, left, rows, columns = boxes.unbind(1)
    assert (boxes >= 0).all() and (top + rows <= 224).all() and (left + columns <= 224).all()
    area, ratio = rows * columns / 224**2, columns / rows
    assert 0.345 < area.min() < 0.36 and area.max() > 0.97
    assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.37
    assert abs(ratio.log().mean()) < 0.02 and abs(mirrored.double().mean() - 0.5) < 0.04
    small = area < 0.5  # all of these fit, so that their area is uniform
    assert abs(area[small].mean() - 0.425) < 0.005
    room = 224 - rows[small]
    assert abs((top[small] / room).mean() - 0.5) < 0.03 and (top == 0).any() and (top + rows == 224).any()
    wide, _ = random_boxes(20, 8, 80, seeded(), 1.0)
    assert wide.tolist() == [[0, 34, 8, 11]] * 20  # torchvision: the middle, of the widest shape


def test_resized_crop_of_parts():
    """The same generator gives the same batch, at once or in parts; another one another."""
    pixels = torch.randint(0, 256, (11, 3, 70, 70), dtype=torch.uint8, generator=seeded(1))
    whole, noise = resized_crop_and_flip(pixels, seeded()), seeded()
    assert torch.equal(whole, torch.cat([resized_crop_and_flip(part, noise) for part in pixels.split(4)]))
    assert torch.equal(whole, resized_crop_and_flip(pixels, seeded()))
    assert not torch.equal(whole, resized_crop_and_flip(pixels, seeded(4)))


def test_which_augmentation():
    assert augmentation(options.make()) is augmentation(options.make(image_size=64)) is crop_and_flip
    assert augmentation(options.make(image_size=224, augment="crop")) is crop_and_flip
    for config in (options.make(image_size=65), options.make(augment="resized_crop")):
        assert augmentation(config).func is resized_crop_and_flip and augmentation(config).keywords == {"least": 0.35}
    assert augmentation(options.make(image_size=224, crop_scale=0.08)).keywords == {"least": 0.08}


def test_missing_and_changed_files(tiny, tmp_path):
    """What is no file counts as missing; a file's size and time are in the cache's key, as is its name."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a.png").write_bytes(b"one")
    names = ["a.png", "folder.png", "gone.png", "a.png/under.png"]
    assert [status is not None for status in stats_inside(tmp_path, names)] == [True, False, False, False]

    def key(name: str = "a.png", size: int = 8) -> str:
        return image_cache.key(tmp_path, [name], size, stats_inside(tmp_path, [name]))

    first = key()
    os.utime(tmp_path / "a.png", ns=(1, 2))
    second = key()
    (tmp_path / "a.png").write_bytes(b"three")
    os.utime(tmp_path / "a.png", ns=(1, 2))
    third = key()
    os.rename(tmp_path / "a.png", tmp_path / "b.png")
    assert len({first, second, third, key("b.png"), key("b.png", 9)}) == 5


def test_domains_of_large_jpegs(tmp_path):
    """Office-31 like: JPEGs of several sizes in class folders of two domains, at more pixels than a padded crop is for."""
    noise = np.random.default_rng(0)
    for domain, (width, height) in {"webcam": (300, 260), "dslr": (231, 500)}.items():
        for label, name in enumerate(("bike", "mug")):
            folder = tmp_path / "office" / domain / "images" / name
            folder.mkdir(parents=True)
            for number in range(3):
                coarse = noise.integers(100 * label, 100 * label + 100, (6, 6, 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize((width + 7 * number, height))
                picture.save(folder / f"frame_{number:04d}.jpg")
    flags = {"data_dir": tmp_path / "office", "output_csv": "office.csv", "domains": "webcam,dslr"}
    for source in ("train", "test"):
        assert main_tasks(arguments({**flags, "source": source, "output_dir": tmp_path / "csv"})) == 0
    job = tmp_path / "run"
    tiny = Tiny(tmp_path / "office", tmp_path / "csv", tmp_path)
    found = train(tiny, job, image_size=72, cache="mmap", method="replay", replay_rate=0.5, train_batch_size=8)
    assert all(math.isfinite(value) for row in found["top1"] for value in row)
    assert json.loads((job / "config.json").read_text())["image_size"] == 72
    assert "converted: scaled, and the middle cut to 72x72" in (job / "logger.log").read_text()
