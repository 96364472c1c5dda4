"""CSVs, dataset.json, images and cached tensors that others wrote: they load, or one line says what is wrong."""

from __future__ import annotations

import io
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.hostile import refused
from support.tiny import SIDE, arguments, settings, write_csvs, write_images

from lifequant import options
from lifequant.__main__ import train as command
from lifequant.common.arguments import run_main
from lifequant.common.safe_files import MOST_CLASSES, stats_inside
from lifequant.data import dataset, dataset_json, image_cache
from lifequant.data.task_csv import leaves_root, read_rows

ROWS = "image,label\na.png,0\nb.png,1\n"
READ = [("a.png", 0), ("b.png", 1)]


@pytest.mark.parametrize(
    "content",
    [
        ROWS.encode("utf-8-sig"),
        ROWS.replace("\n", "\r\n").encode(),
        ROWS.replace("\n", "\r").encode(),
        b'"image","label"\n"a.png","0"\n\n"b.png","1"',
        b"label,more,image\n0,x,a.png\n1,,b.png\n",
        ("image,label" + ",x" * 10_000 + "\na.png,0" + ",1" * 10_000 + "\nb.png,1" + "," * 10_000).encode(),
    ],
    ids=["BOM", "CRLF", "CR", "quotes", "columns", "10,000 columns"],
)
def test_csv_as_others_write_it(content, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    assert read_rows(tmp_path / "x.csv") == READ


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no column 'image'"),
        (ROWS.encode("utf-16"), "not UTF-8 text"),
        (b"image,label\n" + b"".join(b"%05d.png,0\n" % n for n in range(20_000)) + b"\xff", "not UTF-8 text"),
        (b"image,label\na.png,0.5\n", "row 2: the label '0.5' is not a whole"),
        (b"image,label\na.png,-1\n", "row 2: the label '-1' is not a whole"),
        (b"image,label\na.png,9223372036854775808\n", "is not a whole"),
        (b"image,label\na.png,999999999\n", "the label 999999999 is above 99999"),
        ("image,label\na.png,\u0663\n".encode(), "is not a whole"),
        (b"image,label\na.png,\x00\n", "'\\x00' is not a whole"),
        (b"image,label\n" + b"x" * 5000 + b",0\n", "a path of 5000 characters"),
        (b"image,label\n" + b"x" * 10_000_000 + b",0\n", "not a CSV"),
        (b"image,label\n" + b",".join([b"x" * 1000] * 10_000), "more than 1048576 characters"),
        (b'image,label\n"' + b"x\n" * 10_000_000, "field larger"),
        (b"image,label\n" + b'"\n",' * 400_000, "more than 1048576 characters"),
        (b"image,label\n" + b"1," * 1000, "1001 values"),
        (b"image,label\na.png," + b"9" * 100_000, "100000 characters"),
        (b",".join([b"x"] * 10_000), "no column 'image'"),
    ],
)  # fmt: skip
def test_csv_that_is_refused(content, word, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    refused(lambda: read_rows(tmp_path / "x.csv"), "x.csv", word)


def test_a_million_rows(tmp_path):
    (tmp_path / "x.csv").write_text(
        "image,label\n" + "".join(f"train/{n % 100}/{n}.png,{n % 100}\n" for n in range(10**6))
    )
    begin = time.process_time()
    rows = read_rows(tmp_path / "x.csv")
    assert len(rows) == 10**6 and rows[-1] == ("train/99/999999.png", 99) and time.process_time() - begin < 30


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "huge"])
def test_csv_that_is_no_file(kind, tiny, tmp_path, capsys):
    """Through the command line: no waiting for a FIFO's writer, no reading without end."""
    csvs = write_csvs(tiny.images, tmp_path / "csvs")
    path = csvs / "tiny_train0.csv"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    assert run_main(command, arguments(settings(tiny, tmp_path / "job", csv_dir=csvs))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("1099511627776 bytes" if kind == "huge" else "not a regular file") in error


@pytest.mark.parametrize("name", ["tiny_train999999.csv", f"tiny_train{10**18}.csv"])
def test_a_task_number_without_end(name, tiny, tmp_path):
    """A file's name can't make a list of 10^18 tasks; a number too long to be one names no task."""
    csvs = write_csvs(tiny.images, tmp_path / "csvs")
    (csvs / "tiny_train0.csv").copy(csvs / name) if hasattr(Path, "copy") else (csvs / name).write_text(ROWS)
    config = options.make(**settings(tiny, tmp_path / "job", csv_dir=csvs))
    if len(name) > 22:
        assert len(dataset.load_dataset(config, torch.device("cpu"), print).ids) == 2
    else:
        refused(lambda: dataset.load_dataset(config, torch.device("cpu"), print), "tiny_train2.csv is not in")


@pytest.mark.parametrize(
    ("image", "leaves"),
    [
        *((path, True) for path in ("/etc/passwd", "\\etc", "C:\\a", "c:a", "0:", "\\\\host\\a", "..", "../a", "a/..", "a/../b")),
        *((path, True) for path in ("a\\..\\b", "a\0b", "\0")),
        *((path, False) for path in ("a/b.png", "..a", "a..", "a/...", "a/..b/c", "\u202egnp.exe", "ab:c/d", "\uff0e\uff0e\uff0fa")),
    ],
)  # fmt: skip
def test_paths(image, leaves):
    assert leaves_root(image) == leaves


def test_links(tmp_path):
    """Links may lead to the image root and stay inside it; out of it they may not, neither a file nor a folder."""
    root = tmp_path / "real"
    (root / "in").mkdir(parents=True)
    for path in (root / "in" / "a.png", tmp_path / "secret.png", tmp_path / "real2.png"):
        path.write_bytes(b"x")
    (tmp_path / "root").symlink_to("real")
    (root / "file.png").symlink_to("in/a.png")
    (root / "folder").symlink_to("in")
    (root / "loop").symlink_to("loop")
    (root / "out.png").symlink_to("../secret.png")
    (root / "near.png").symlink_to("../real2.png")  # a name that begins as the root's does
    (root / "out").symlink_to("..")
    os.mkfifo(root / "fifo.png")
    names = [
        "in/a.png",
        "file.png",
        "folder/a.png",
        "loop",
        "loop/a.png",
        "fifo.png",
        "in",
        "gone/a.png",
        "x" * 300,
        "\ud800",
    ]
    for top in (root, tmp_path / "root"):
        found = [status is not None for status in stats_inside(top, names)]
        assert found == [True] * 3 + [False] * 7
        for name in ("out.png", "near.png", "out/secret.png"):
            refused(lambda top=top, name=name: stats_inside(top, [name]), name, "out of the image root")


RECORD = {"schema": 1, "counts": {}, "name": "tiny"}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 100_000, "not readable as JSON"),
        ('{"a":' * 100_000, "not readable as JSON"),
        ('{"schema": 1, "counts": {}, "lt_gamma": NaN}', "not readable as JSON"),
        ('{"schema": 1, "counts": {}, "lt_gamma": 1e999}', "lt_gamma is not"),
        (json.dumps({**RECORD, "name": "x" * 10**7}), "name is not"),
        (json.dumps({**RECORD, "name": ["x"]}), "name is not"),
        (json.dumps({**RECORD, "class_names": {"a": 1}}), "class_names is not"),
        (json.dumps({**RECORD, "class_names": [1, 2]}), "class_names is not"),
        (json.dumps({**RECORD, "class_names": ["a", "a"]}), "class_names is not"),
        (json.dumps({**RECORD, "class_names": ["a\x1b[2J"]}), "class_names is not"),
        (json.dumps({**RECORD, "class_names": [str(n) for n in range(MOST_CLASSES + 1)]}), "class_names is not"),
        (json.dumps({**RECORD, "image_root": 3}), "image_root is not"),
        (json.dumps({**RECORD, "image_root": "a\0b"}), "image_root is not"),
        (json.dumps({**RECORD, "image_root": "\ud800"}), "image_root is not"),
        (json.dumps({**RECORD, "lt_gamma": "2"}), "lt_gamma is not"),
        (json.dumps({**RECORD, "num_tasks": True}), "num_tasks is not"),
        (json.dumps({**RECORD, "tasks": [[0]]}), "tasks is not"),
        (json.dumps({**RECORD, "counts": {"train": "many"}}), "counts is not"),
        ("1" * 100_000, "not readable as JSON"),
        (" " * (2**25 + 1), "bytes, more than"),
    ],
    ids=range(20),
)  # fmt: skip
def test_dataset_json(text, word, tmp_path):
    (tmp_path / "dataset.json").write_text(text)
    refused(lambda: dataset_json.read(tmp_path), "dataset.json", word)


@pytest.mark.parametrize("place", ["class_names", "image_root"])
def test_names_longer_than_any(place, tiny, tmp_path):
    """Found by fuzzing: an image root that no system takes was a raw error of 3,000 characters."""
    csvs = write_csvs(tiny.images, tmp_path / "csvs")
    record = json.loads((csvs / "dataset.json").read_text())
    record[place] = "a/" * 2000 if place == "image_root" else ["x" * 300]
    (csvs / "dataset.json").write_text(json.dumps(record))
    config = options.make(**settings(tiny, tmp_path / "job", csv_dir=csvs, data_dir=None))
    refused(
        lambda: dataset.load_dataset(config, torch.device("cpu"), print),
        place if place == "class_names" else "says the images",
    )


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_a_cache_that_would_run_code(tiny, tmp_path, monkeypatch):
    """A .npy of objects is a pickle: where the cache was, it is not loaded but made anew."""
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    names = ["train/ant/0001.png", "train/bee/0002.png"]
    call = (tiny.images, names, SIDE, tmp_path / "cache", "x", print)
    whole = image_cache.load_images(*call).numpy()
    (file,) = (tmp_path / "cache").iterdir()
    objects = io.BytesIO()
    np.save(objects, np.array([Payload()] * 2, dtype=object), allow_pickle=True)
    for content in (objects.getvalue(), pickle.dumps(Payload())):
        file.write_bytes(content)
        assert (image_cache.load_images(*call).numpy() == whole).all() and not (tmp_path / "ran").exists()
    np.load(io.BytesIO(objects.getvalue()), allow_pickle=True)  # the payload is a real one
    assert (tmp_path / "ran").exists()


def test_names_on_the_terminal(tmp_path, capsys, monkeypatch):
    """Control and direction characters in paths are shown as escapes, whoever prints them."""
    root = write_images(tmp_path / "images", ["ant", "bee"], train=3, test=2)
    csvs = write_csvs(root, tmp_path / "csvs", rate=100)
    rows = (csvs / "tiny_train0.csv").read_text().splitlines()
    (csvs / "tiny_train0.csv").write_text("\n".join([*rows, '"train/\x1b[2J\u202e\x07\nx.png",0']))
    tiny = type("", (), {"images": root, "csvs": csvs})
    assert run_main(command, arguments(settings(tiny, tmp_path / "job"))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.strip("\n").isprintable() and "\\x1b[2J\\u202e\\x07\\nx.png" in error
