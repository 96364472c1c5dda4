"""Image preparation: small archives made here, and scikit-learn's digits, through the script's own main."""

import hashlib
import io
import os
import pickle
import sys
import tarfile
import urllib.error

import numpy as np
import pytest
import torchvision.datasets.utils
from PIL import Image

from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError, one_line
from lifequant.data.create import image_set, prepared
from lifequant.data.create.images import main_prepare

CLASSES = ["cat", "apple"]  # not sorted: a label is a place in the archive's list, a folder has the name


def batches(dataset, seed=0):
    """The files of a little archive: 5 batches (CIFAR-10) or one of 6 training images, and 4 test images."""
    rng = np.random.default_rng(seed)

    def batch(n):
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [place % 2 for place in range(n)]
        return {"data": data, "labels": labels} if dataset == "cifar10" else {"data": data, "fine_labels": labels}

    if dataset == "cifar10":
        return {f"data_batch_{k}": batch(2) for k in range(1, 6)} | {
            "test_batch": batch(4),
            "batches.meta": {"label_names": CLASSES},
        }
    return {"train": batch(6), "test": batch(4), "meta": {"fine_label_names": CLASSES}}


def archive(folder, dataset, files):
    """cifar-10-python.tar.gz in ``folder``, of pickles or of bytes as they are."""
    name, base = {
        "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
        "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python"),
    }[dataset]
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w:gz") as tar:
        for file, content in files.items():
            content = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(f"{base}/{file}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return folder / name


def run(out, source=None, dataset="cifar10"):
    return run_main(
        main_prepare, ["--dataset", dataset, "--out", str(out), *(["--source", str(source)] if source else [])]
    )


def tree(out):
    """Every file's content and time."""
    return {
        path.relative_to(out): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in out.rglob("*.*")
        if path.is_file()
    }


def official(monkeypatch, folder, dataset, files):
    """An archive of ``files``, whose MD5 sums stand in torchvision's lists from now on."""
    path = archive(folder, dataset, files)
    known = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
    sums = {name: hashlib.md5(pickle.dumps(content, protocol=2)).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(known, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    for listed in ("train_list", "test_list"):
        monkeypatch.setattr(known, listed, [[name, sums[name]] for name, _ in getattr(known, listed)])
    monkeypatch.setattr(known, "meta", {**known.meta, "md5": sums[known.meta["filename"]]})
    return path


@pytest.fixture
def ten(tmp_path, monkeypatch):
    return official(monkeypatch, tmp_path / "source", "cifar10", batches("cifar10"))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar(tmp_path, capsys, monkeypatch, dataset):
    files = batches(dataset)
    source = official(monkeypatch, tmp_path / "source", dataset, files)
    out = tmp_path / "out"
    assert run(out, source, dataset) == 0
    said = capsys.readouterr()
    half = 5 if dataset == "cifar10" else 3
    assert f"train: {2 * half} images, 2 classes, {half} images a class" in said.out
    for split, names in (("train", [n for n in files if "test" not in n and "meta" not in n]), ("test", [n for n in files if "test" in n])):  # fmt: skip
        data = np.concatenate([files[name]["data"] for name in names])
        for label, name in enumerate(CLASSES):
            expected = [row.reshape(3, 32, 32) for row in data[label::2]]  # in archive order, by class
            paths = sorted((out / split / name).iterdir())
            assert [path.name for path in paths] == [f"{n:04d}.png" for n in range(1, len(expected) + 1)]
            for path, planes in zip(paths, expected, strict=True):
                assert np.array_equal(np.moveaxis(np.asarray(Image.open(path)), 2, 0), planes)
    assert not [path for path in out.rglob(".*") if path.name != ".prepared.json"]


def test_any_form_of_the_source(tmp_path, ten, capsys):
    """Archive, folder with the archive, folder with the unpacked folder, and this folder itself are one source."""
    with tarfile.open(ten) as tar:
        tar.extractall(tmp_path / "unpacked")  # made above; Python 3.11.2 has no filter
    out = tmp_path / "out"
    assert run(out, ten) == 0
    before = tree(out)
    for source in (ten.parent, tmp_path / "unpacked", tmp_path / "unpacked" / "cifar-10-batches-py"):
        assert run(out, source) == 0
        assert "complete already" in capsys.readouterr().out
    assert run(out) == 0  # complete: the source is needed no more
    assert tree(out) == before


def test_goes_on_where_it_was(tmp_path, ten, capsys, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(whole, ten) == 0
    write, left = prepared.write_all, iter(range(6))

    def interrupt(files):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(files)

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "write_all", interrupt)
        assert run(out, ten) == 130
    begun = tree(out)
    assert len(begun) == 6  # the note and five images
    spoilt = out / "train" / "cat" / "0002.png"
    spoilt.write_bytes(spoilt.read_bytes()[:-20])
    assert run(out, ten) == 0
    assert "4 of 14 images are there" in capsys.readouterr().out
    after = tree(out)
    assert {path: content for path, (content, _) in after.items()} == {p: c for p, (c, _) in tree(whole).items()}
    rewritten = {path.as_posix() for path in begun if after[path] != begun[path]}
    assert rewritten == {"train/cat/0002.png", ".prepared.json"}


def test_refuses_what_is_not_its_own(tmp_path, ten, capsys):
    def refused(out, source, named, dataset="cifar10"):
        before = tree(out)
        assert run(out, source, dataset) == 2
        assert named in capsys.readouterr().err.splitlines()[-1] and tree(out) == before

    foreign = tmp_path / "foreign" / "train" / "cat"
    foreign.mkdir(parents=True)
    (foreign / "0001.png").touch()
    refused(tmp_path / "foreign", ten, "did not write")
    out = tmp_path / "out"
    assert run(out, ten) == 0
    refused(out, None, "holds cifar10", dataset="cifar100")
    note = (out / ".prepared.json").read_text()
    (out / ".prepared.json").write_text(note.replace("official archive", "archive 123"))
    refused(out, ten, "begun with other images")
    (out / ".prepared.json").write_text(note)
    (out / "train" / "cat" / "0006.png").touch()
    refused(out, ten, "0006.png")
    (out / "train" / "cat" / "0006.png").unlink()
    (out / "test" / "dog").mkdir()
    refused(out, ten, "dog")
    (out / ".prepared.json").write_text("{")
    refused(out, ten, "damaged")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_no_code_runs_from_an_archive(tmp_path, ten, monkeypatch, capsys, file, unpacked):
    """A file that torchvision doesn't list is not unpickled, and an archive that it doesn't list is not unpacked."""
    monkeypatch.chdir(tmp_path)
    source = archive(tmp_path / "bad", "cifar10", {**batches("cifar10"), file: {"data": Payload(), "labels": []}})
    if unpacked:
        with tarfile.open(source) as tar:
            tar.extractall(tmp_path / "bad" / "unpacked")
        source = tmp_path / "bad" / "unpacked"
    assert run("out", source) == 2
    message = capsys.readouterr().err
    assert message.startswith("lifequant: error: ") and "not the official" in message and message.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "source"]
    pickle.loads(pickle.dumps(Payload()))  # the payload is a real one
    assert (tmp_path / "hacked").is_dir()


@pytest.mark.parametrize("name", ["../../x", ".git", "b", "a\x1b[2J"])
def test_class_names_that_name_no_folder(name):
    with pytest.raises(UserError) as error:
        prepared.checked_names([name, "b"])
    assert one_line(error.value).isprintable()


def test_bad_sources(tmp_path, ten, capsys):
    (tmp_path / "cut.tar.gz").write_bytes(ten.read_bytes()[:5000])
    (tmp_path / "text.tar.gz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    hundred = archive(tmp_path / "hundred", "cifar100", batches("cifar100"))
    for source, named in (("cut.tar.gz", "damaged"), ("text.tar.gz", "damaged"), ("empty", "a file is missing"),
                          ("nowhere", "no such file"), (hundred.parent, "cifar-10-python.tar.gz")):  # fmt: skip
        assert run(tmp_path / "out", tmp_path / source) == 2
        message = capsys.readouterr().err
        assert named in message and message.count("\n") == 1
    assert run(tmp_path / "out", ten, "digits") == 2
    assert not (tmp_path / "out").exists()


def test_download(tmp_path, ten, capsys, monkeypatch):
    def fail(*_):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fail)
    assert run(tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "--source" in message and "no network" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()

    def copy(url, root, filename, md5):
        assert (url, md5) == (torchvision.datasets.CIFAR10.url, torchvision.datasets.CIFAR10.tgz_md5)
        root.mkdir(parents=True)
        (root / filename).write_bytes(ten.read_bytes())

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", copy)
    assert run(tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".prepared.json", "test", "train"]


def test_digits(tmp_path, capsys, monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setattr(os, "fsync", lambda file: None)  # 1,797 files take seconds with it
    data = load_digits()
    out = tmp_path / "out"
    assert run(out, dataset="digits") == 0
    for digit in range(10):
        n = int((data.target == digit).sum())
        counts = [len(list((out / split / str(digit)).iterdir())) for split in ("train", "test")]
        assert counts == [n - round(0.2 * n), round(0.2 * n)]
    image = Image.open(out / "train" / "7" / "0001.png")
    assert image.size == (32, 32) and image.mode == "RGB"
    # an 8x8 image, enlarged four times and averaged back by area, is about what it was
    small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)) / 255 * 16
    nearest = np.abs(data.images - small).mean(axis=(1, 2)).argmin()
    assert data.target[nearest] == 7
    before = tree(out)
    assert run(out, dataset="digits") == 0
    assert "complete already" in capsys.readouterr().out and tree(out) == before
    a, b = image_set.digits(0), image_set.digits(1)
    assert a.counts() == b.counts() and not np.array_equal(a.images["test"], b.images["test"])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run(tmp_path / "other", dataset="digits") == 2
    assert "pip install lifequant[demo]" in capsys.readouterr().err
