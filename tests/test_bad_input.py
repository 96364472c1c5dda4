"""What a person may get wrong: one line on stderr that says what, where and what to do; exit code 2; nothing lost."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import Tiny, arguments, settings, train, write_csvs

from lifequant import options
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.models.build import build


class Place:
    """A copy of the task CSVs that a test may spoil, and a job folder that holds a finished run."""

    def __init__(self, tiny: Tiny, folder: Path) -> None:
        self.tiny, self.folder, self.images = tiny, folder, tiny.images
        self.csvs = shutil.copytree(tiny.csvs, folder / "csvs")
        self.job = folder / "job"
        for name in ("config.json", "results.json", "logger.log", "model_best.pt", "checkpoint/last.pt", "run/events"):
            (self.job / name).parent.mkdir(parents=True, exist_ok=True)
            (self.job / name).write_text("of the former run")

    def csv(self, task: int = 0, source: str = "train") -> Path:
        return self.csvs / f"tiny_{source}{task}.csv"

    def edit(self, change: Callable[[list[str]], list[str]], **which: Any) -> None:
        path = self.csv(**which)
        path.write_text("".join(line + "\n" for line in change(path.read_text().splitlines())))

    def own_images(self) -> Path:
        """A copy of the images, in use from now on."""
        self.images = shutil.copytree(self.tiny.images, self.folder / "images")
        return self.images

    def contents(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


def missing_column(place: Place) -> None:
    place.edit(lambda lines: ["image,class", *lines[1:]])


def label_of_text(place: Place) -> None:
    place.edit(lambda lines: [lines[0], lines[1].replace(",", ",x"), *lines[2:]])


def unknown_label(place: Place) -> None:
    place.edit(lambda lines: [*lines[:-1], lines[-1].split(",")[0] + ",6"])


def unknown_test_label(place: Place) -> None:
    place.edit(lambda lines: [*lines[:-1], lines[-1].split(",")[0] + ",17"], task=1, source="test")


def two_labels(place: Place) -> None:
    """An image that both tasks have, with another label in the second."""
    both = set(place.csv(0).read_text().split()) & set(place.csv(1).read_text().split()) - {"image,label"}
    image, label = sorted(both)[0].split(",")
    place.edit(lambda lines: [f"{image},{(int(label) + 1) % 6}" if line.startswith(image + ",") else line for line in lines],
               task=1)  # fmt: skip


def duplicate_row(place: Place) -> None:
    place.edit(lambda lines: [*lines, lines[3]])


def not_utf8(place: Place) -> None:
    place.csv().write_bytes(place.csv().read_bytes() + b"train/\xff.png,0\n")


def short_row(place: Place) -> None:
    place.edit(lambda lines: [*lines, "train/ant/0001.png"])


def missing_image(place: Place) -> None:
    (place.own_images() / "train" / "dog" / "0002.png").unlink()


def broken_image(place: Place) -> None:
    path = place.own_images() / "train" / "dog" / "0002.png"
    path.write_bytes(path.read_bytes()[:60])


def no_image(place: Place) -> None:
    (place.own_images() / "test" / "dog" / "0002.png").write_text("text")


def empty_task(place: Place) -> None:
    place.edit(lambda lines: lines[:1], task=1)


def empty_file(place: Place) -> None:
    place.csv(1).write_text("")


def leaves_the_root(place: Place) -> None:
    place.edit(lambda lines: [*lines, "train/../../secret.png,0"])


def absolute_path(place: Place) -> None:
    place.edit(lambda lines: [*lines, f"{place.tiny.images}/train/ant/0001.png,0"])


def in_both(place: Place) -> None:
    """A test image among the training images."""
    row = place.csv(source="test").read_text().splitlines()[1]
    place.edit(lambda lines: [*lines, row])


def no_test(place: Place) -> None:
    place.csv(1, "test").unlink()


def two_data_sets(place: Place) -> None:
    write_csvs(place.tiny.images, place.folder / "other", "other")
    for path in (place.folder / "other").glob("other_*"):
        shutil.move(path, place.csvs / path.name)


def broken_record(place: Place) -> None:
    (place.csvs / "dataset.json").write_text("{")


def stale_root(place: Place) -> None:
    record = place.csvs / "dataset.json"
    record.write_text(record.read_text().replace(str(place.tiny.images), str(place.folder / "gone")))
    place.images = None


def foreign_replay(place: Place) -> None:
    for task in range(2):
        shutil.copy(place.csv(1 - task), place.csvs / f"tiny_replay{task}.csv")


def source_is_text(place: Place) -> None:
    (place.folder / "model.pt").write_text("no model")


def source_is_empty(place: Place) -> None:
    (place.folder / "model.pt").write_bytes(b"")


def source_is_a_pickle(place: Place) -> None:
    """Of an object, which must not be made."""
    torch.save({"schema": 1, "kind": "model", "x": Place}, place.folder / "model.pt")


def source_is_tensors(place: Place) -> None:
    torch.save({"weight": torch.zeros(3)}, place.folder / "model.pt")


def source(place: Place, classes: int = 6, **flags: Any) -> None:
    config = options.make(**flags)
    names = [str(label) for label in range(classes)]
    state = checkpoint.model_state(config, build(config, classes), names)
    checkpoint.write(place.folder / "model.pt", state)


def source_of_another_network(place: Place) -> None:
    source(place, target_model="resnet56")


def source_of_other_classes(place: Place) -> None:
    source(place, classes=7)


def nothing(place: Place) -> None:
    pass


SOURCE = {"source_file": "model.pt"}
CASES = [
    (missing_column, {}, ["tiny_train0.csv", "no column 'label'", "image, class"]),
    (label_of_text, {}, ["tiny_train0.csv, row 2", "not a whole number"]),
    (unknown_label, {}, ["tiny_train0.csv", "label 6", "6 classes"]),
    (unknown_test_label, {}, ["tiny_test1.csv", "label 17"]),
    (two_labels, {}, ["tiny_train1.csv", "elsewhere"]),
    (duplicate_row, {}, ["tiny_train0.csv", "more than once"]),
    (not_utf8, {}, ["tiny_train0.csv", "not UTF-8"]),
    (short_row, {}, ["tiny_train0.csv, row 34", "1 values"]),
    (missing_image, {}, ["1 of 72 images", "train/dog/0002.png", "--data_dir"]),
    (broken_image, {}, ["train/dog/0002.png", "can't be read", "replace it"]),
    (no_image, {}, ["test/dog/0002.png", "can't be read"]),
    (empty_task, {}, ["tiny_train1.csv", "no images"]),
    (empty_file, {}, ["tiny_train1.csv", "no column 'image'"]),
    (leaves_the_root, {}, ["tiny_train0.csv", "leaves the image root"]),
    (absolute_path, {}, ["tiny_train0.csv", "leaves the image root"]),
    (in_both, {}, ["training and test CSVs both"]),
    (no_test, {}, ["tiny_test1.csv is missing", "--source test"]),
    (two_data_sets, {}, ["other and tiny", "--dataset"]),
    (broken_record, {}, ["dataset.json", "not readable as JSON"]),
    (stale_root, {}, ["dataset.json", "gone", "--data_dir"]),
    (foreign_replay, {}, ["tiny_replay0.csv", "not in tiny_train0.csv"]),
    (nothing, {"num_tasks": 3}, ["--num_tasks", "tiny_train2.csv", "0, 1"]),
    (nothing, {"task_id": 5}, ["--task_id", "tiny_train5.csv"]),
    (nothing, {"dataset": "tinny"}, ["--dataset tinny", "did you mean 'tiny'"]),
    (nothing, {"csv_dir": "nowhere"}, ["--csv_dir nowhere", "lifequant tasks"]),
    (nothing, {"data_dir": "nowhere"}, ["--data_dir nowhere", "lifequant images"]),
    (nothing, {"num_classes": 5}, ["--num_classes 5", "6 classes"]),
    (nothing, {"method": "ourss"}, ["unknown method 'ourss'", "did you mean 'ours'"]),
    (nothing, {"quantizer": "lsqq"}, ["unknown quantizer 'lsqq'", "did you mean 'lsq'"]),
    (nothing, {"num_epoch": 1}, ["unknown flag --num_epoch", "did you mean '--num_epochs'"]),
    (nothing, {"bitW": 7}, ["--bitW"]),
    (nothing, {"lr": "-1"}, ["--lr"]),
    (nothing, {"lr": "nan"}, ["--lr"]),
    (nothing, {"device": "cuda"}, ["--device cuda", "--device auto or cpu"]),
    (nothing, SOURCE, ["model.pt: no such model", "this makes a 32-bit one: lifequant --csv_dir", "--bitW 32"]),
    (source_is_text, SOURCE, ["model.pt", "not a checkpoint"]),
    (source_is_empty, SOURCE, ["model.pt", "not a checkpoint"]),
    (source_is_a_pickle, SOURCE, ["model.pt", "not a checkpoint"]),
    (source_is_tensors, SOURCE, ["model.pt: its weights do not fit resnet20: weight is not in resnet20"]),
    (source_of_another_network, SOURCE, ["model.pt", "target_model is resnet56", "resnet20"]),
    (source_of_other_classes, SOURCE, ["model.pt", "7 classes", "has 6"]),
    (nothing, {"start_task": 1, "from": "nowhere"}, ["--from nowhere", "task0.pt"]),
]


@pytest.mark.parametrize(
    ("spoil", "flags", "words"), CASES, ids=lambda x: x.__name__ if callable(x) else "".join(x) if x else ""
)
def test_one_line(spoil, flags, words, tiny, tmp_path, monkeypatch, capsys):
    """Even with --reset nothing is touched: all is checked first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    place = Place(tiny, tmp_path)
    monkeypatch.chdir(tmp_path)
    spoil(place)
    before = place.contents()
    given = {"csv_dir": place.csvs, "data_dir": place.images, **flags, "reset": True}
    assert run_main(command, arguments(settings(tiny, place.job, **given))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("lifequant: error: ")
    for word in words:
        assert word in error
    assert place.contents() == before


def test_full_disk_at_start(tiny, tmp_path, monkeypatch, capsys):
    place = Place(tiny, tmp_path)
    before = place.contents()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert run_main(command, arguments(settings(tiny, place.job, reset=True))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "are free on this disk" in error and place.contents() == before


def test_no_gpu_is_needed(tiny, tmp_path, monkeypatch):
    """--gpus picks an index where there is a GPU, and demands none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = train(tiny, tmp_path / "run", method="original", num_tasks=1, device="auto", gpus=3)
    assert len(found["top1"]) == 1
