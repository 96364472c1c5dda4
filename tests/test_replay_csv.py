"""Replay CSVs and class counts, through the scripts' own mains, from CSVs written by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest
from support.placeholders import rows

from lifequant.common.arguments import run_main
from lifequant.data import dataset_json
from lifequant.data.create.class_counts import main_counts
from lifequant.data.create.replay import main_replay
from lifequant.data.split import lowest


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, data):
    Path(path).write_text("image,label\n" + "".join(f"{image},{label}\n" for image, label in data))


def test_replay(here, capsys):
    data = [(f"train/{label}/{n}.png", label) for label in (0, 3, 7) for n in range(4)]
    tasks = [data[:8], data[4:], data]
    for task, train in enumerate(tasks):
        write(f"x_train{task}.csv", train)
    Path("dataset.json").write_text(dataset_json.text(dataset_json.record("x", ["a"], [[0]], None, 0, 0.25)))
    assert run_main(main_replay, ["--replay_rate=50", "--num_tasks=3"]) == 0
    for task, train in enumerate(tasks):
        paths, labels = zip(*train, strict=True)
        places = lowest(paths, labels, dict.fromkeys(labels, 2), 0, "replay")  # as a training run chooses
        assert rows(f"x_replay{task}.csv") == [train[place] for place in places]
        assert Counter(labels[place] for place in places) == dict.fromkeys(labels, 2)
    assert json.loads(Path("dataset.json").read_text())["counts"] == {"replay": [4, 4, 6]}
    assert run_main(main_replay, ["--output_csv=x.csv", "--replay_rate=0.01", "--num_tasks=2", "--seed=1"]) == 0
    assert Counter(label for _, label in rows("x_replay0.csv")) == {0: 1, 3: 1}  # at least one image a class
    assert not Path("x_replay2.csv").exists()  # of the former run with more tasks


def test_two_data_sets(here, capsys):
    for name in ("cifar10", "cifar100"):
        write(f"{name}_train0.csv", [("a.png", 0)])
    assert run_main(main_replay, []) == 2
    assert "cifar10, cifar100" in capsys.readouterr().err
    assert run_main(main_replay, ["--data_csv=cifar1.csv"]) == 2
    assert "did you mean 'cifar10'" in capsys.readouterr().err
    for wanted in ("cifar10", "cifar10.csv", "cifar10_train.csv"):
        Path("cifar10_replay0.csv").unlink(missing_ok=True)
        assert run_main(main_replay, [f"--output_csv={wanted}"]) == 0
        assert Path("cifar10_replay0.csv").exists() and not Path("cifar100_replay0.csv").exists()


def test_count_classes(here, capsys):
    (here / "z_train0.csv").write_text("image,label\na.png,0\nb.png,0\nc.png,0\nd.png,7\n")
    assert run_main(main_counts, []) == 0
    # two classes, shares 3/4 and 1/4: 1 / (2 * 3/4 + 1) and 1 / (2 * 1/4 + 1)
    assert json.loads(Path("reweight_0.json").read_text()) == pytest.approx({"0": 0.4, "7": 2 / 3})
    assert "   0        2        4       1       3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"image,class\na.png,0\n", "no column 'label'"),
        (b"", "no column 'image'"),
        (b"image,label\n", "no images"),
        (b"image,label\na.png,cat\n", "row 2: the label 'cat'"),
        (b"image,label\na.png,-1\n", "row 2: the label '-1'"),
        (b"image,label\na.png,0\n\nb.png\n", "row 4"),
        (b"image,label\n,0\n", "row 2: no image"),
        (b"image,label\na.png,0\na.png,1\n", "a.png is there more than once"),
        (b"image,label\n\xff.png,0\n", "not UTF-8"),
        (b'image,label\n"a.png,0\n', "not a CSV"),
    ],
)
def test_bad_csvs(here, capsys, content, named):
    (here / "x_train0.csv").write_bytes(content)
    for main in (main_replay, main_counts):
        assert run_main(main, []) == 2
        message = capsys.readouterr().err
        assert named in message and "x_train0.csv" in message and message.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["x_train0.csv"]


def test_gaps_in_the_tasks(here, capsys):
    assert run_main(main_counts, []) == 2
    assert "lifequant tasks" in capsys.readouterr().err
    write("x_train0.csv", [("a.png", 0)])
    write("x_train2.csv", [("a.png", 0)])
    assert run_main(main_replay, []) == 2 and run_main(main_counts, ["--num_tasks=2"]) == 2
    assert capsys.readouterr().err.count("x_train1.csv is missing") == 2
