"""From pixels on disk to batches: the cache, augmentation, what may be replayed, what may be trained on."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.tiny import SIDE, TEST, TRAIN, Tiny, arguments, settings

from lifequant import options, registry
from lifequant.data import dataset, image_cache
from lifequant.data.augment import CIFAR, crop_and_flip, normalize
from lifequant.data.create.tasks import main_tasks
from lifequant.data.replay import stored_rows
from lifequant.data.task import Task
from lifequant.data.task_csv import csv_text, read_rows


@pytest.fixture
def pictures(tmp_path) -> tuple[Path, list[str], np.ndarray]:
    """A folder, the names of its pictures, and their pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, SIDE, SIDE), dtype=np.uint8)
    names = [f"{number}.png" for number in range(6)]
    for name, picture in zip(names, pixels, strict=True):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / name)
    return tmp_path, names, pixels


def cached(pictures: tuple, cache: Path, said: list[str] | None = None, names: list[str] | None = None) -> np.ndarray:
    root, every, _ = pictures
    say = (said if said is not None else []).append
    return image_cache.load_images(root, names or every, SIDE, cache, "x-train", say).numpy()


def test_cache_hit(pictures, tmp_path, monkeypatch):
    """The second time nothing is decoded; other images or another size are another file."""
    cache = tmp_path / "cache"
    assert (cached(pictures, cache) == pictures[2]).all() and len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "decode", None)
        assert (cached(pictures, cache) == pictures[2]).all()
    assert (cached(pictures, cache, names=["3.png", "1.png"]) == pictures[2][[3, 1]]).all()
    assert image_cache.load_images(*pictures[:2], 8, cache, "x-train", print).shape == (6, 3, 8, 8)
    assert len(list(cache.iterdir())) == 3


def test_stale_cache(pictures, tmp_path):
    root, names, pixels = pictures
    cached(pictures, tmp_path / "cache")
    before = os.stat(root / names[2])
    Image.fromarray(pixels[5].transpose(1, 2, 0)).save(root / names[2])
    os.utime(root / names[2], ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert (cached(pictures, tmp_path / "cache")[2] == pixels[5]).all()


@pytest.mark.parametrize(
    "content",
    [b"", b"no array", b"PK\x03\x04 no archive", b"\x80\x04no pickle.", "half", "other"],
    ids=["empty", "text", "zip", "pickle", "half", "other"],
)
def test_broken_cache(content, pictures, tmp_path):
    """Whatever lies where the cache was: it is made anew."""
    cache = tmp_path / "cache"
    cached(pictures, cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    if content == "half":
        content = whole[: len(whole) // 2]
    if content == "other":
        np.save(file, np.zeros((2, 3, SIDE, SIDE), np.uint8))
    else:
        file.write_bytes(content)
    assert (cached(pictures, cache) == pictures[2]).all()
    assert file.read_bytes() == whole and list(cache.iterdir()) == [file]


def test_unwritable_cache(pictures, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    said: list[str] = []
    assert (cached(pictures, tmp_path / "file" / "cache", said) == pictures[2]).all()
    assert len(said) == 1 and "in memory" in said[0]


def test_conversion(tmp_path):
    """Grey, transparent, wide and large images become RGB of one size, which is said."""
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    wide = rng.integers(0, 256, (SIDE, SIDE + 10, 3), dtype=np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.new("RGBA", (2 * SIDE, 2 * SIDE), (10, 20, 30, 255)).save(tmp_path / "large.png")
    said: list[str] = []
    found = image_cache.load_images(
        tmp_path, ["grey.png", "wide.png", "large.png"], SIDE, tmp_path / "c", "x", said.append
    ).numpy()
    assert (found[0] == grey).all()
    assert (found[1] == wide[:, 5:-5].transpose(2, 0, 1)).all()  # the middle
    assert (found[2] == np.array([10, 20, 30])[:, None, None]).all()
    converted = [line for line in said if "decoded images" not in line]
    assert len(converted) == 3 and all(line.startswith("1 of 3 images were converted: ") for line in converted)


def test_crop_and_flip():
    """Each image is one of the 162 crops and mirrored crops that PIL makes of it; all of them are drawn alike."""
    n, side, pad = 1500, 8, 4
    pixels = np.random.default_rng(2).integers(0, 256, (n, 3, side, side), dtype=np.uint8)
    found = crop_and_flip(torch.tensor(pixels), torch.Generator().manual_seed(3)).numpy()
    draws = []
    for before, after in zip(pixels, found, strict=True):
        padded = ImageOps.expand(Image.fromarray(before.transpose(1, 2, 0)), pad, 0)
        matches = []
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                crop = np.asarray(padded)[top : top + side, left : left + side]
                for mirrored, view in ((False, crop), (True, crop[:, ::-1])):
                    if (view.transpose(2, 0, 1) == after).all():
                        matches.append((top, left, mirrored))
        assert len(matches) == 1
        draws += matches
    for place, values in ((0, 9), (1, 9), (2, 2)):
        counts = Counter(draw[place] for draw in draws)
        expected, spread = n / values, 4 * np.sqrt(n / values)
        assert len(counts) == values and all(abs(count - expected) < spread for count in counts.values())
    assert len(set(draws)) == 162  # the three are drawn apart
    again = crop_and_flip(torch.tensor(pixels), torch.Generator().manual_seed(3)).numpy()
    assert (again == found).all()


def test_normalize():
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (pixels.numpy() / 255 - np.reshape(CIFAR.mean, (3, 1, 1))) / np.reshape(CIFAR.std, (3, 1, 1))
    found = normalize(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last) and pixels.dtype == torch.uint8


def loaded(tiny: Tiny, **more) -> tuple[options.Config, dataset.DataSet]:
    config = options.make(**settings(tiny, Path("unused"), **more))
    return config, dataset.load_dataset(config, torch.device("cpu"), lambda line: None)


def task(found: dataset.DataSet, config: options.Config, place: int) -> Task:
    return found.task(place, config, registry.method(config.method).joint)


def labels_of(found: dataset.DataSet, rows: torch.Tensor) -> Counter:
    return Counter(found.train.labels[rows].tolist())


def test_test_images_stay_apart(tiny):
    """Two stores with no image in common; what a task trains on comes from the training CSVs and folder alone."""
    config, found = loaded(tiny, csv_dir=tiny.csvs3)
    assert not set(found.train.paths) & set(found.test.paths)
    assert found.train.images.untyped_storage().data_ptr() != found.test.images.untyped_storage().data_ptr()
    for place in range(3):
        mine = task(found, config, place)
        assert mine.images is found.train.images and mine.labels is found.train.labels
        names = {found.train.paths[row] for row in mine.pool.tolist()}
        assert names and all(name.startswith("train/") for name in names)
        new = {found.train.paths[row] for row in mine.new_rows.tolist()}
        assert new == {image for image, _ in read_rows(tiny.csvs3 / f"tiny_train{place}.csv")}
        tests = {found.test.paths[row] for row in found.test_rows[place]}
        assert tests == {image for image, _ in read_rows(tiny.csvs3 / f"tiny_test{place}.csv")}
    for store in (found.train, found.test):
        for name, label, pixels in zip(store.paths, store.labels.tolist(), store.images.numpy(), strict=True):
            assert found.class_names[label] == name.split("/")[1]
            assert (pixels == np.asarray(Image.open(tiny.images / name)).transpose(2, 0, 1)).all()


def test_replay(tiny):
    """Every class of every old task has the same share stored; the current task's images are left out, but not forgotten."""
    config, found = loaded(tiny, csv_dir=tiny.csvs3, replay_rate=0.5)
    tasks = [task(found, config, place) for place in range(3)]
    assert len(tasks[0].replay) == tasks[0].buffer_count == 0
    for place in (1, 2):
        now = tasks[place]
        assert not set(now.new_rows.tolist()) & set(now.replay.tolist())
        old = set().union(*(set(tasks[t].classes) for t in range(place)))
        assert now.buffer_count == len(old) * TRAIN // 2
        gone = old - set(now.classes)
        assert gone and labels_of(found, now.replay) == dict.fromkeys(gone, TRAIN // 2)
        assert labels_of(found, now.past_rows) == dict.fromkeys(old, TRAIN)
        assert now.counts.tolist() == [labels_of(found, now.pool)[c] for c in range(6)]
    assert set(tasks[1].replay.tolist()) <= set(tasks[2].replay.tolist())
    config, found = loaded(tiny, csv_dir=tiny.csvs3, method="original")
    assert len(task(found, config, 2).replay) == 0


@pytest.mark.parametrize("seed", range(60))
def test_buffer_is_nested(seed):
    """Of an old task, a buffer holds no image that it did not hold before; its size is kept, its shares are equal."""
    draw = random.Random(seed)
    domains, classes, tasks, buffer = seed % 2, draw.randint(1, 4), draw.randint(2, 5), draw.randint(1, 30)
    labels: list[int] = []
    past: list[list[int]] = []
    for place in range(tasks):
        mine = [c if domains else 10 * place + c for c in range(classes) for _ in range(draw.randint(1, 20))]
        past.append(list(range(len(labels), len(labels) + len(mine))))
        labels += mine
    paths = [f"{row}.png" for row in range(len(labels))]
    before: set[int] = set()
    for place, stored in enumerate(stored_rows(paths, labels, past, 0.2, buffer, 0), 1):
        rows = set(stored)
        seen = Counter(labels[row] for task_rows in past[:place] for row in task_rows)
        assert len(rows) == min(buffer, seen.total())
        assert rows - set(past[place - 1]) <= before
        if buffer < seen.total():
            kept = Counter(labels[row] for row in rows)
            assert all(abs(kept[c] - buffer * n / seen.total()) < 1 for c, n in seen.items())
        before = rows


def test_long_tail_and_replay(tiny):
    """n_max * lt_gamma^(-c/(K-1)) of each class; replay is a part of what is left; test images are untouched."""
    config, found = loaded(tiny, lt_gamma=8)
    expected = {c: max(1, int(TRAIN * 8 ** (-c / 5) + 1e-9)) for c in range(6)}
    assert expected[0] == TRAIN and expected[5] == 1
    assert Counter(found.train.labels.tolist()) == expected
    assert Counter(found.test.labels.tolist()) == dict.fromkeys(range(6), TEST)
    second = task(found, config, 1)
    assert set(second.replay.tolist()) <= set(found.new_rows[0])
    assert all(n >= 1 for n in labels_of(found, second.replay).values())


def test_replay_csvs(tiny, tmp_path):
    """What they name is stored; --replay_rate and --buffer_size say otherwise, which is told."""
    folder = shutil.copytree(tiny.csvs, tmp_path / "csvs")
    named = [[row for row in read_rows(folder / f"tiny_train{t}.csv") if row[0].endswith("3.png")] for t in range(2)]
    for place, rows in enumerate(named):
        (folder / f"tiny_replay{place}.csv").write_text(csv_text(rows))
    said: list[str] = []
    for flag, value in ((None, None), ("replay_rate", 0.25), ("buffer_size", 5)):
        config = options.make(**settings(tiny, tmp_path / "unused", csv_dir=folder, **({flag: value} if flag else {})))
        found = dataset.load_dataset(config, torch.device("cpu"), said.append)
        second = task(found, config, 1)
        names = {found.train.paths[row] for row in second.replay.tolist()}
        if flag is None:
            now = set(second.classes)
            assert names == {image for image, label in named[0] if label not in now} and second.buffer_count == 4
        else:
            assert second.buffer_count == {"replay_rate": 4 * 2, "buffer_size": 5}[flag]
    assert "the images that the replay CSVs" in said[0] and all("are not used" in line for line in said[1:])


def test_validation_images(tiny):
    """Held out of training and replay in every task, the same share of each class, never a class's last image."""
    config, found = loaded(tiny, csv_dir=tiny.csvs3, val_fraction=0.25, replay_rate=0.5)
    held = set().union(*found.held_out)
    assert labels_of(found, torch.tensor(sorted(held))) == dict.fromkeys(range(6), TRAIN // 4)
    for place in range(3):
        mine = task(found, config, place)
        assert not held & set(mine.pool.tolist()) and not held & set(mine.past_rows.tolist())
        assert set(found.held_out[place]) == {row for row in held if found.train.labels[row] in mine.classes}
    _, found = loaded(tiny, lt_gamma=8, val_fraction=0.25)
    for place in range(2):
        trained = set(found.train.labels[found.new_rows[place]].tolist())
        assert trained == {label for _, label in read_rows(tiny.csvs / f"tiny_train{place}.csv")}


def test_domain_tasks(tiny, tmp_path):
    """The same classes from another folder a task; replay is of the other domains."""
    for domain in ("cam", "web"):
        for name in ("ant", "bee"):
            (tmp_path / "images" / domain / name).mkdir(parents=True)
            for picture in range(5):
                shutil.copy(tiny.images / "train" / name / f"000{1 + picture}.png", tmp_path / "images" / domain / name)
    flags = {"data_dir": tmp_path / "images", "output_csv": "d.csv", "domains": "cam,web", "output_dir": tmp_path / "c"}
    for source in ("train", "test"):
        assert main_tasks(arguments({**flags, "source": source})) == 0
    config, found = loaded(tiny, csv_dir=tmp_path / "c", data_dir=tmp_path / "images", replay_rate=0.5)
    second = task(found, config, 1)
    assert second.classes == [0, 1] and found.num_classes == 2
    assert {found.train.paths[row].split("/")[0] for row in second.replay.tolist()} == {"cam"}
    assert labels_of(found, second.replay) == {0: 2, 1: 2}


def test_class_count(tiny, tmp_path):
    """dataset.json's, else 1 + the largest label over the CSVs of all tasks, not only of those that run."""
    folder = shutil.copytree(tiny.csvs, tmp_path / "csvs")
    (folder / "dataset.json").unlink()
    assert loaded(tiny, csv_dir=folder, num_tasks=1)[1].num_classes == 6
    assert max(label for _, label in read_rows(folder / "tiny_train0.csv")) < 6
    record = json.loads((tiny.csvs / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**record, "class_names": [*record["class_names"], "gnu"]}))
    assert loaded(tiny, csv_dir=folder, task_id=1)[1].class_names[-1] == "gnu"
    assert loaded(tiny, num_classes=9)[1].num_classes == 9
