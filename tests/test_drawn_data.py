"""Changed CSVs and dataset.json, drawn by hypothesis or tried one by one: they load, or one line says what is wrong."""

from __future__ import annotations

import json
import ntpath
import posixpath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.hostile import ODD, VALUES, changed_bytes, changed_csv, changed_json, few, loads_or_refuses

from lifequant import options
from lifequant.common.errors import UserError, one_line
from lifequant.common.safe_files import MOST_CLASSES
from lifequant.data import dataset
from lifequant.data.task_csv import csv_text, leaves_root, read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of CSVs of two tasks, replay among them, with links in its image root; the content of each file."""
    top = tmp_path_factory.mktemp("hostile")
    root, rows = top / "root", {"train": [], "test": []}
    for side, label, number in [(side, label, number) for side in rows for label in range(3) for number in range(3)]:
        name = f"{side}/{label}/{number}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (label, number, 0)).save(root / name)
        rows[side].append(f"{name},{label}\n")
    (root / "loop").symlink_to("loop")
    (root / "out").symlink_to(top)
    files = {}
    for task in range(2):
        train, test = rows["train"][task:], rows["test"][task:]
        for source, own in (("train", train), ("test", test), ("replay", train[::2])):
            files[f"x_{source}{task}.csv"] = ("image,label\n" + "".join(own)).encode()
    record = {"schema": 1, "name": "x", "class_names": ["a", "b", "c"], "image_root": str(root), "num_tasks": 2}
    record |= {"diminish_rate": 0.5, "seed": 0, "lt_gamma": 1.0, "images_per_class": None, "domains": None}
    record |= {"tasks": [{"classes": [0, 1]}, {"classes": [1, 2]}], "counts": {"train": [9, 8]}}
    (top / "csvs").mkdir()
    return top, {**files, "dataset.json": json.dumps(record).encode()}


def load(folder, name: str, content: bytes) -> None:
    """Load ``folder`` as a run does, with another ``content`` of the file ``name``."""
    top, files = folder
    for file, whole in {**files, name: content}.items():
        (top / "csvs" / file).write_bytes(whole)
    config = options.make(csv_dir=top / "csvs", cache_dir=top / "cache", image_size=8, job_dir=top / "job")
    loads_or_refuses(lambda: dataset.load_dataset(config, torch.device("cpu"), lambda line: None))


@pytest.mark.parametrize("row", ["{},0\n", "out/{},0\n", "train/0/0.png,{}\n"])
def test_every_odd_cell(folder, row):
    for odd in ODD:
        quoted = '"' + odd.replace('"', '""') + '"' if set(odd) & set('",\r\n') else odd
        load(folder, "x_train0.csv", ("image,label\n" + row.format(quoted)).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("key", ["name", "class_names", "image_root", "tasks", "counts"])
def test_every_odd_value(folder, key):
    for value in VALUES:
        record = {**json.loads(folder[1]["dataset.json"]), key: value}
        load(folder, "dataset.json", json.dumps(record).encode())


@pytest.mark.parametrize("name", ["x_train0.csv", "x_replay1.csv", "dataset.json"])
@few
@given(data=st.data())
def test_folders_that_others_wrote(folder, name, data):
    files = folder[1]
    structured = changed_json if name == "dataset.json" else changed_csv
    load(folder, name, data.draw(structured(files[name]) | changed_bytes(files[name])))


@few
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20),
            st.integers(0, MOST_CLASSES - 1),
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda row: row[0],
    )
)
def test_any_names_survive(tmp_path, rows):
    """What csv_text writes is what read_rows reads, whatever the names (but for control characters, which are refused)."""
    (tmp_path / "x.csv").write_bytes(csv_text(rows).encode())
    assert read_rows(tmp_path / "x.csv") == rows


@few
@given(st.text(max_size=40))
def test_no_path_escapes(path):
    """What is admitted stays below the root by the rules of both families of systems."""
    if not leaves_root(path):
        assert posixpath.normpath(posixpath.join("/r", path)).startswith("/r")
        assert ntpath.normpath(ntpath.join("C:\\r", path)).startswith("C:\\r")


@few
@given(st.binary(max_size=200), st.sampled_from([b"", b"image,label\n", b"\xef\xbb\xbfimage,label\r\n"]))
def test_any_bytes(tmp_path, content, begin):
    (tmp_path / "x.csv").write_bytes(begin + content)
    try:
        rows = read_rows(tmp_path / "x.csv")
    except UserError as error:
        assert one_line(error).isprintable() and len(one_line(error)) < 1000
    else:
        assert rows and all(0 <= label < MOST_CLASSES for _, label in rows)
