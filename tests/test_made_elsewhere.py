"""CSVs and folders of images made by other programs: another name of an image is the same image, whatever can be read is
taken, whatever is left out is counted, and what the generator accepts a run accepts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image
from support.hostile import refused
from support.tiny import SIDE

from lifequant import options
from lifequant.common.arguments import run_main
from lifequant.data import dataset
from lifequant.data.create.class_folders import EXTENSIONS
from lifequant.data.create.tasks import main_tasks
from lifequant.data.task_csv import csv_text, read_rows
from lifequant.experiments.grid_tasks import write_tasks

COMPOSED, TAKEN_APART = (normalize(form, "d/b\u00e9.png") for form in ("NFC", "NFD"))
TRAIN = [("d/a0.png", 0), ("d/a1.png", 0), ("d/b0.png", 1), (COMPOSED, 1)]
TEST = [("d/ta.png", 0), ("d/tb.png", 1)]


def picture(path: Path, seed: int = 0, mode: str = "RGB", **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **more)


@pytest.fixture
def root(tmp_path) -> Path:
    for seed, (name, _) in enumerate([*TRAIN, *TEST]):
        picture(tmp_path / "images" / name, seed)
    return tmp_path / "images"


def loaded(root: Path, tables: dict[str, list[tuple[str, int]]], said: list[str] | None = None) -> dataset.DataSet:
    """The data set of the CSVs x_<name>.csv with these rows."""
    csvs = root.parent / "csvs"
    csvs.mkdir(exist_ok=True)
    for name, rows in tables.items():
        (csvs / f"x_{name}.csv").write_text(csv_text(rows), encoding="utf-8")
    config = options.make(csv_dir=csvs, data_dir=root, image_size=SIDE, cache_dir=root.parent / "cache")
    return dataset.load_dataset(config, torch.device("cpu"), (said if said is not None else []).append)


def two_names(root: Path) -> dict[str, str]:
    """Other names of d/a0.png; those that are links are made."""
    (root / "d" / "link.png").symlink_to("a0.png")
    (root / "folder").symlink_to("d")
    os.link(root / "d" / "a0.png", root / "d" / "hard.png")
    return {
        "dot": "./d/a0.png",
        "two slashes": "d//a0.png",
        "dot inside": "d/./a0.png",
        "backslash": "d\\a0.png",
        "blank": " d/a0.png",
        "quotes": '"d/a0.png"',
        "link": "d/link.png",
        "linked folder": "folder/a0.png",
        "hard link": "d/hard.png",
    }


NAMES = ["dot", "two slashes", "dot inside", "backslash", "blank", "quotes", "link", "linked folder", "hard link"]


@pytest.mark.parametrize("name", NAMES)
def test_another_name_is_the_same_image(name, root):
    other = two_names(root)[name]
    refused(
        lambda: loaded(root, {"train0": TRAIN, "test0": [*TEST, (other, 0)]}), "x_test0.csv", "d/a0.png", "training"
    )
    refused(lambda: loaded(root, {"train0": [*TRAIN, (other, 1)], "test0": TEST}), "x_train0.csv", "a0.png")
    refused(
        lambda: loaded(root, {"train0": TRAIN, "train1": [(other, 1)], "test0": TEST, "test1": TEST}),
        "x_train1.csv",
        "the label 1, not 0",
    )


@pytest.mark.parametrize("name", NAMES)
def test_in_two_tasks_it_is_one_image(name, root):
    other = two_names(root)[name]
    found = loaded(root, {"train0": TRAIN, "train1": [(other, 0), *TRAIN[1:]], "test0": TEST, "test1": TEST})
    assert len(found.train.paths) == 4 and found.new_rows[0] == found.new_rows[1] == [0, 1, 2, 3]
    plain = loaded(root, {"train1": TRAIN})
    assert found.train.images.sum() == plain.train.images.sum()


def test_a_link_beside_its_image_is_taken_once(root):
    two_names(root)
    said: list[str] = []
    found = loaded(root, {"train0": [*TRAIN, ("d/link.png", 0), ("d/hard.png", 0)], "test0": TEST}, said)
    assert len(found.train.paths) == 4 and any("2 rows" in line and "taken once" in line for line in said)
    for twice in ("./d/a0.png", "d\\a0.png"):
        refused(lambda twice=twice: loaded(root, {"train0": [*TRAIN, (twice, 0)]}), "x_train0.csv", "more than once")


def test_unicode_forms(root):
    """A CSV from a Mac on another system, and one name in both forms."""
    plain = loaded(root, {"train0": TRAIN, "test0": TEST})
    apart = loaded(root, {"train0": [*TRAIN[:3], (TAKEN_APART, 1)]})
    assert apart.train.paths == plain.train.paths and torch.equal(apart.train.images, plain.train.images)
    refused(lambda: loaded(root, {"test0": [*TEST, (COMPOSED, 1)]}), "the same image", "training")
    mixed = normalize("NFD", "\u00e4") + normalize("NFC", "/\u00f6.png")
    picture(root / mixed)
    assert mixed in loaded(root, {"train0": [*TRAIN, (normalize("NFC", mixed), 1)], "test0": TEST}).train.paths
    picture(root / TAKEN_APART)  # two files whose names look the same
    refused(lambda: loaded(root, {"train0": TRAIN, "test0": [*TEST, (TAKEN_APART, 1)]}), "the same image", "training")


@pytest.mark.parametrize("spell", [lambda p: p.replace("/", "\\"), lambda p: f" {p} ", lambda p: f"'{p}'"])
def test_other_spellings_load_as_the_plain_one(spell, root):
    plain = loaded(root, {"train0": TRAIN, "test0": TEST, "replay0": TRAIN[1:3]})
    other = loaded(root, {"train0": [(spell(image), label) for image, label in TRAIN], "test0": [(spell(p), y) for p, y in TEST]})  # fmt: skip
    assert other.train.paths == plain.train.paths and other.replay_csv == plain.replay_csv == [[1, 2]]
    assert torch.equal(other.train.images, plain.train.images) and dataset.data_key(other) == dataset.data_key(plain)
    refused(lambda: loaded(root, {"train0": [("..\\images\\d\\a0.png", 0)]}), "leaves the image root")


def test_names_as_written_stay(root):
    """A blank or a backslash that a file's name has is no mistake, and what is written ranks the images for replay."""
    odd = [(" d/a.png", 0), ("d/a\\b.png", 0), ("./d/b0.png", 1)]
    for image, _ in odd[:2]:
        picture(root / image)
    assert loaded(root, {"train0": odd, "test0": TEST}).train.paths == sorted(image for image, _ in odd)


ROWS = [("a.png", 0), ("b.png", 1)]


@pytest.mark.parametrize(
    "text",
    [
        "image, label\na.png, 0\nb.png, 1\n",
        'image, label\n"a.png", "0"\n"b.png", "1"\n',
        ",image,label\n0,a.png,0\n1,b.png,1\n",
        "Unnamed: 0,image,label\n0,a.png,0\n1,b.png,1\n",
        "image;label\na.png;0\nb.png;1\n",
        "image\tlabel\na.png\t0\nb.png\t1\n",
        "'image','label'\n'a.png','0'\n'b.png','1'\n",
        "Image,Label\na.png,0\nb.png,1\n",
        "\ufeff\ufeffimage,label\na.png,0\nb.png,1\n",
        '\ufeff"label","image"\n0,a.png\n1,b.png\n',
        "image,label\na.png,0.0\nb.png,1.0\n",
        "image,label\na.png, 0 \nb.png,\t1\n",
        "image,label\na.png,0,\nb.png,1,,\n",
        "\ufeffsep=;\r\nimage;label\r\na.png;0\r\nb.png;1\r\n",
        "\n\nimage,label\na.png,0\nb.png,1\n",
    ],
)
def test_csvs_of_other_programs(text, tmp_path):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    assert read_rows(tmp_path / "x.csv") == ROWS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"image","label"\n"1","a.png",0\n"2","b.png",1\n', "index column has no name"),
        ("a.png,0\nb.png,1\n", "its first row is no header"),
        ("path,class\na.png,0\n", "no column 'image' (columns: path, class)"),
        ("image,label\na.png,ant\n", "'ant' is not a whole number"),
        ("\nsep=;\nimage;label\na.png;0\nb.png;\n", "row 5: the label '' is not a whole number"),
        ("image,label\na.png,1.5\n", "'1.5' is not a whole number"),
        ("image,label\n./a.png,0\na.png,0\n", "a.png is there more than once"),
        ("image,label\na.png,0,left\n", "3 values where the header has 2"),
    ],
)
def test_csvs_named_for_what_they_are(text, words, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    refused(lambda: read_rows(tmp_path / "x.csv"), "x.csv", words)


def generate(root: Path, source: str = "train", out: str = "made") -> int:
    flags = {"data_dir": root, "output_csv": "x.csv", "num_tasks": 2, "diminish_rate": 100, "source": source}
    return run_main(main_tasks, [f"--{k}={v}" for k, v in {**flags, "output_dir": root.parent / out}.items()])


def class_folders(root: Path, classes: str = "ab") -> Path:
    for seed, (side, name) in enumerate((side, name) for side in ("train", "test") for name in classes):
        picture(root / side / name / "0.png", seed)
    return root


def run_accepts(root: Path, said: list[str] | None = None, **more) -> dataset.DataSet:
    config = options.make(csv_dir=root.parent / "made", image_size=SIDE, cache_dir=root.parent / "cache", **more)
    return dataset.load_dataset(config, torch.device("cpu"), (said if said is not None else []).append)


def test_every_image_is_taken_or_counted(tmp_path, capsys):
    root = class_folders(tmp_path / "images")
    folder = root / "train" / "a"
    formats = {".jfif": "JPEG", ".jpe": "JPEG", ".pnm": "PPM", ".pbm": "PPM", ".pgm": "PPM", ".apng": "PNG"}
    for seed, end in enumerate(EXTENSIONS):
        mode = {".pgm": "L", ".pbm": "1"}.get(end, "RGB")
        for name in (f"n{end}", f"N{end.upper()}"):
            more = {"format": formats[end]} if end in formats else {}
            picture(folder / name, seed, mode, **more)
    picture(folder / "no_end", 50, format="PNG")
    picture(folder / "photo.jpg_large", 51, format="JPEG")
    taken = sorted(path.name for path in folder.iterdir())
    picture(folder / "more" / "deeper" / "1.png")
    (folder / ".DS_Store").write_text("x")
    (folder / "notes.txt").write_text("x")
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "twice.png").symlink_to("0.png")
    (folder / "zfolder").symlink_to("../b")
    os.mkfifo(folder / "fifo.png")
    picture(root / "train" / "beside.png")
    assert generate(root) == generate(root, "test") == 0
    rows = read_rows(tmp_path / "made" / "x_train.csv")
    assert sorted(image for image, label in rows if label == 0) == [f"train/a/{name}" for name in taken]
    note = " ".join(capsys.readouterr().out.split())
    for words in ("9 files are left out", "2 in folders below a class (train/a/more)", "1 with names that begin with a dot",
                  "2 no files, or links that lead nowhere", "2 no images of a known kind (train/a/notes.txt)",
                  "1 other names of images that are taken (train/a/twice.png)", "1 beside the class folders"):  # fmt: skip
        assert words in note
    assert len(run_accepts(root).train.paths) == len(rows) == 2 * len(EXTENSIONS) + 4


@pytest.mark.parametrize("kind", ["class folders", "sides", "files", "relative"])
def test_data_sets_put_together_from_links(kind, tmp_path, capsys):
    archive, root = class_folders(tmp_path / "archive"), tmp_path / "images"
    root.mkdir()
    for side in ("train", "test"):
        if kind == "sides":
            (root / side).symlink_to(archive / side)
            continue
        (root / side).mkdir()
        for name in "ab":
            if kind == "files":
                (root / side / name).mkdir()
                (root / side / name / "0.png").symlink_to(archive / side / name / "0.png")
            else:
                target = archive / side / name
                (root / side / name).symlink_to(os.path.relpath(target, root / side) if kind == "relative" else target)
    assert generate(root) == generate(root, "test") == 0
    assert "links lead out of" in capsys.readouterr().out.replace("\n  ", " ")
    found = run_accepts(root)
    assert found.train.paths == ["train/a/0.png", "train/b/0.png"] and len(found.test.paths) == 2
    record = json.loads((tmp_path / "made" / "dataset.json").read_text())
    assert record["linked"] == sorted(str(archive / side / name) for side in ("train", "test") for name in "ab")
    del record["linked"]  # as CSVs from elsewhere come: nobody has agreed to read there
    (tmp_path / "made" / "dataset.json").write_text(json.dumps(record))
    refused(lambda: run_accepts(root), "out of the image root", "make the task CSVs again")
    (tmp_path / "made" / "dataset.json").write_text(json.dumps({**record, "linked": ["not/absolute"]}))
    refused(lambda: run_accepts(root), "linked is not a list of folders")


def test_a_grid_of_linked_folders(tmp_path):
    archive, root = class_folders(tmp_path / "archive"), tmp_path / "images"
    root.mkdir()
    for side in ("train", "test"):
        (root / side).symlink_to(archive / side)
    write_tasks({"dataset": "x", "num_tasks": 2, "diminish_rate": 100}, 0, root, tmp_path / "made")
    assert len(run_accepts(root, data_dir=root).train.paths) == 2


def test_the_generator_refuses_what_a_run_would(tmp_path, capsys):
    root = class_folders(tmp_path / "images")
    (root / "test" / "a" / "1.png").symlink_to("../../train/a/0.png")
    for source in ("train", "test"):
        assert generate(root, source) == 2
        assert "is the same image as" in capsys.readouterr().err
    (root / "test" / "a" / "1.png").unlink()
    (root / "train" / "b" / "1.png").symlink_to("../a/0.png")
    assert generate(root) == 2 and "of another class" in capsys.readouterr().err
    (root / "train" / "b" / "1.png").unlink()
    (root / "train" / "b" / "empty.png").touch()
    assert generate(root) == 0 and "a run refuses to read: 1 (train/b/empty.png)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert "linked" not in json.loads((tmp_path / "made" / "dataset.json").read_text())
