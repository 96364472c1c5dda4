"""Task CSVs, through the script's own main, on folders of empty placeholder images."""

import errno
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from support.placeholders import fill, generate, rows

from lifequant.common import files
from lifequant.common.arguments import run_main
from lifequant.data.create.replay import main_replay
from lifequant.data.split import lowest


def labels(path):
    return sorted({label for _, label in rows(path)})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def ten(tmp_path):
    return fill(tmp_path / "images", [f"class{place}" for place in range(10)], train=4, test=2)


def test_paper_sizes(tmp_path, here):
    data = fill(tmp_path / "images", [f"class{place:02d}" for place in range(100)], train=1, test=1)
    assert generate(data) == 0 and generate(data, "test") == 0
    tasks = [labels(here / "x_025" / f"x_train{task}.csv") for task in range(3)]
    assert [len(task) for task in tasks] == [66, 66, 68]
    assert len(set(tasks[0]) & set(tasks[1])) == 50 and set().union(*tasks) == set(range(100))
    assert tasks == [labels(here / "x_025" / f"x_test{task}.csv") for task in range(3)]
    assert generate(data, seed=1, output_dir="other") == 0
    assert tasks[0] != labels(here / "other" / "x_train0.csv")


def test_contents(ten, here, capsys):
    assert generate(ten) == 0 and generate(ten, "test") == 0
    folder = here / "x_025"
    expected = [(f"train/class{label}/{n:04d}.png", label) for label in range(10) for n in range(1, 5)]
    assert rows(folder / "x_train.csv") == expected
    tasks = [rows(folder / f"x_train{task}.csv") for task in range(3)]
    assert [len(task) for task in tasks] == [24, 24, 32]  # 6, 6 and 8 classes
    assert all(row in expected for task in tasks for row in task)
    assert sorted(row[0] for row in rows(folder / "x_test.csv")) == sorted(
        path.relative_to(ten).as_posix() for path in (ten / "test").glob("*/*")
    )
    record = json.loads((folder / "dataset.json").read_text())
    assert record == {
        "schema": 1,
        "name": "x",
        "class_names": [f"class{place}" for place in range(10)],
        "image_root": str(ten.resolve()),
        "num_tasks": 3,
        "diminish_rate": 0.25,
        "seed": 0,
        "lt_gamma": 1.0,
        "images_per_class": None,
        "domains": None,
        "tasks": [{"classes": sorted({label for _, label in task})} for task in tasks],
        "counts": {"train": [24, 24, 32], "test": [12, 12, 16]},
    }
    assert "25 %" in capsys.readouterr().out
    assert not list(folder.glob(".*"))  # no temporary file


@pytest.mark.parametrize(
    ("typed", "folder", "sizes"),
    [("0.25", "x_025", [6, 6, 8]), ("100", "x_100", [3, 3, 4]), ("1", "x_100", [3, 3, 4]), ("50", "x_050", [5, 5, 6])],
)
def test_rates(ten, here, typed, folder, sizes):
    assert generate(ten, diminish_rate=typed) == 0
    assert [len(labels(here / folder / f"x_train{task}.csv")) for task in range(3)] == sizes


def test_relative_data_dir(ten, here, monkeypatch, capsys):
    """The caller's folder first, then the clone's top; with or without src/."""
    monkeypatch.setattr(files, "TOP", ten.parent)
    for typed in ("images", "src/images/", "../images", str(ten)):
        assert generate(typed) == 0
        assert f"images: {ten.resolve()}\n" in capsys.readouterr().out
    fill(here / "src" / "images", ["a", "b", "c"], train=1)
    assert generate("images", diminish_rate=100, output_dir="near") == 0
    assert f"images: {(here / 'src' / 'images').resolve()}\n" in capsys.readouterr().out
    assert generate("src/nowhere") == 2
    message = capsys.readouterr().err
    tried = [here / "src" / "nowhere", here / "nowhere", ten.parent / "src" / "nowhere", ten.parent / "nowhere"]
    assert all(str(path) in message for path in tried) and "lifequant images --dataset" in message


def test_stale_and_merged(ten, here, capsys):
    folder = here / "x_100"
    assert generate(ten, num_tasks=5, diminish_rate=100) == 0
    assert generate(ten, "test", num_tasks=5, diminish_rate=1) == 0
    assert run_main(main_replay, ["--data_dir", "x_100"]) == 0
    (folder / "x_train7.csv.bak").touch()
    (folder / "xy_train4.csv").touch()
    capsys.readouterr()
    assert generate(ten, diminish_rate=100) == 0
    said = capsys.readouterr().out
    assert "x_train3.csv, x_train4.csv" in said and "test CSVs" in said and "replay CSVs" in said
    assert sorted(path.name for path in folder.glob("x*train*")) == [
        "x_train.csv", "x_train0.csv", "x_train1.csv", "x_train2.csv", "x_train7.csv.bak", "xy_train4.csv",
    ]  # fmt: skip
    assert (folder / "x_test4.csv").exists()  # of the other source: named, not deleted
    assert set(json.loads((folder / "dataset.json").read_text())["counts"]) == {"train"}
    assert generate(ten, "test", diminish_rate=100) == 0
    assert not (folder / "x_test4.csv").exists()
    before = (folder / "dataset.json").read_text()
    assert generate(ten, diminish_rate=100) == 0  # the same again: the test CSVs still hold
    assert (folder / "dataset.json").read_text() == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"seed": 1}, "seed"), ({"diminish_rate": 50}, "diminish_rate"), ({"num_tasks": 2}, "number of tasks")],
)
def test_test_must_agree_with_train(ten, here, capsys, flags, named):
    assert generate(ten, output_dir="out") == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert generate(ten, "test", output_dir="out", **flags) == 2
    assert f"another {named}" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path("out").iterdir()}


def test_thinning(ten, here, capsys):
    assert generate(ten, images_per_class=3, output_dir="three") == 0
    assert generate(ten, images_per_class=2, output_dir="two") == 0
    three, two = (rows(here / name / "x_train.csv") for name in ("three", "two"))
    assert set(two) < set(three) and set(Counter(label for _, label in two).values()) == {2}
    assert generate(ten, lt_gamma=4, output_dir="tail") == 0
    # 4 * 4^(-c/9): 4, 3.4, 2.9, 2.5, 2.2, 1.9, 1.6, 1.4, 1.2, 1
    kept = Counter(label for _, label in rows(here / "tail" / "x_train.csv"))
    assert [kept[label] for label in range(10)] == [4, 3, 2, 2, 2, 1, 1, 1, 1, 1]
    paths, classes = zip(*rows(here / "tail" / "x_train.csv"), strict=True)
    every = [f"train/class9/{n:04d}.png" for n in range(1, 5)]
    assert paths[classes.index(9)] == every[lowest(every, [9] * 4, {9: 1}, 0, "long_tail")[0]]
    capsys.readouterr()
    assert generate(ten, "test", imbalance_ratio=4, output_dir="tail") == 0
    assert "test images stay" in capsys.readouterr().out
    assert len(rows(here / "tail" / "x_test.csv")) == 20
    assert json.loads((here / "tail" / "dataset.json").read_text())["lt_gamma"] == 4


def test_domains(tmp_path, here, capsys):
    fill(tmp_path / "office" / "webcam", ["bike", "mug"], train=3, test=2)
    fill(tmp_path / "office" / "dslr", ["bike", "mug"], images=10)  # as Office-31 is distributed: no split of its own
    domains = {"domains": "dslr,webcam", "num_tasks": None, "diminish_rate": None}
    assert generate(tmp_path / "office", **domains) == 0
    assert generate(tmp_path / "office", "test", **domains) == 0
    folder = here / "x_domains"
    webcam = [(f"webcam/train/{name}/000{n}.png", k) for k, name in enumerate(["bike", "mug"]) for n in (1, 2, 3)]
    assert rows(folder / "x_train1.csv") == webcam
    train, test = rows(folder / "x_train0.csv"), rows(folder / "x_test0.csv")
    assert Counter(label for _, label in train) == {0: 8, 1: 8} and Counter(label for _, label in test) == {0: 2, 1: 2}
    whole = {path.relative_to(tmp_path / "office").as_posix() for path in (tmp_path / "office" / "dslr").rglob("*.png")}
    assert {image for image, _ in train + test} == whole
    assert json.loads((folder / "dataset.json").read_text())["domains"] == ["dslr", "webcam"]
    assert generate(tmp_path / "office", **domains, lt_gamma=5.5, output_dir="tail") == 0
    tail = Counter(label for _, label in rows(here / "tail" / "x_train.csv"))
    assert tail == {0: 11, 1: 2}  # over both domains, as a training run would thin them
    fill(tmp_path / "office" / "amazon", ["bike"], images=1)
    capsys.readouterr()
    assert generate(tmp_path / "office", **{**domains, "domains": "dslr,amazon"}) == 2
    assert "needs two" in capsys.readouterr().err
    (tmp_path / "office" / "amazon" / "images" / "bike" / "0002.png").touch()
    assert generate(tmp_path / "office", **{**domains, "domains": "dslr,amazon"}) == 2
    assert "amazon: no class 'mug'" in capsys.readouterr().err


BAD = [
    ({"diminish_rate": 0}, "no share"),
    ({"diminish_rate": -0.25}, "no share"),
    ({"diminish_rate": 101}, "no share"),
    ({"diminish_rate": "nan"}, "no share"),
    ({"diminish_rate": "inf"}, "no share"),
    ({"diminish_rate": None}, "--diminish_rate is missing"),
    ({"num_tasks": 0}, "at least 1"),
    ({"num_tasks": 11}, "too few"),
    ({"num_tasks": 10**9}, "too few"),
    ({"num_tasks": 8, "diminish_rate": 5}, "too few"),
    ({"seed": -1}, "at least 0"),
    ({"images_per_class": 0}, "at least 1"),
    ({"lt_gamma": 0.5}, "at least 1"),
    ({"lt_gamma": "inf"}, "finite"),
    ({"source": "valid"}, "invalid choice"),
    ({"output_csv": "a/b.csv"}, "--output_dir"),
    ({"output_csv": ".csv"}, "plain name"),
    ({"data_dr": "y"}, "did you mean '--data_dir'"),
    ({"data_dir": "y\x1b[31m\udcff"}, "no such folder"),
    ({"domains": "train,nowhere", "num_tasks": None}, "nowhere"),
    ({"domains": "train,train", "num_tasks": None}, "twice"),
    ({"domains": "train,test", "num_tasks": 3}, "each is one task"),
]


@pytest.mark.parametrize(
    ("flags", "named"), BAD, ids=[str(flags)[1:40].encode("ascii", "replace").decode() for flags, _ in BAD]
)
def test_bad_flags(ten, here, capsys, flags, named):
    assert generate(ten, **flags) == 2
    refused(capsys, here, named)


def refused(capsys, here, named):
    """One printable line on stderr that says ``named``; nothing written."""
    message = capsys.readouterr().err
    assert message.startswith("lifequant: error: ") and message.count("\n") == 1 and message[:-1].isprintable()
    assert named in message
    assert not list(here.iterdir())


def spoil_empty_class(root):
    (root / "train" / "class3" / "notes.txt").touch()
    for path in (root / "train" / "class3").glob("*.png"):
        path.rename(path.with_name(f".{path.name}"))


def spoil_class_names(root):
    os.rename(bytes(root / "train" / "class3"), bytes(root / "train") + b"/\xff\x1b[2J")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_empty_class, "class3: no images"),
        (spoil_class_names, "not plain UTF-8"),
        (lambda root: (root / "train" / "class0" / "a\nb.png").touch(), "not plain UTF-8"),
        (lambda root: (root / "test" / "zebra").mkdir(), "no class 'zebra'"),
        (lambda root: (root / "train" / "zebra").mkdir(), "no class 'zebra'"),
        (lambda root: (root / "train").rename(root / "training"), "no folder train/"),
    ],
)
def test_bad_folders(ten, here, capsys, spoil, named):
    spoil(ten)
    assert generate(ten) == 2
    refused(capsys, here, named)


def test_bad_dataset_json(ten, here, capsys):
    assert generate(ten, output_dir="out") == 0
    assert generate(ten, output_dir="out", output_csv="y.csv") == 2
    assert "--output_dir" in capsys.readouterr().err and not Path("out/y_train.csv").exists()
    for content in ("{", "[]", '{"schema": 2}', "\udcff"):
        Path("out/dataset.json").write_bytes(content.encode(errors="surrogateescape"))
        assert generate(ten, output_dir="out") == 2
        assert "dataset.json" in capsys.readouterr().err


def test_full_disk_leaves_all_as_it_was(ten, here, capsys, monkeypatch):
    assert generate(ten) == 0
    before = {path: path.read_bytes() for path in (here / "x_025").iterdir()}
    sync, left = os.fsync, iter(range(3))

    def fill_up(number):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return sync(number)

    monkeypatch.setattr(os, "fsync", fill_up)
    assert generate(ten, seed=5) == 2
    assert "No space left" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (here / "x_025").iterdir()}
