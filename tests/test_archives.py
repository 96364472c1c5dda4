"""lifequant images of Office-31, ImageCLEF-DA and Tiny ImageNet: small archives with the official layouts, made here."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from support.archives import as_folder, as_tar, as_zip, jpeg, office

from lifequant.common.arguments import run_main
from lifequant.data.create import office31, prepared
from lifequant.data.create.images import main_prepare
from lifequant.data.create.tasks import main_tasks

pytestmark = pytest.mark.usefixtures("no_fsync")
CLEF = ["aeroplane", "bike", "bird", "boat", "bottle", "bus", "car", "dog", "horse", "monitor", "motorbike", "people"]


def run(out: Path, source: Path, dataset: str = "office31", *more: str) -> int:
    return run_main(main_prepare, ["--dataset", dataset, "--out", str(out), "--source", str(source), *more])


def said_of(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def refused(capsys, *argv) -> str:
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("lifequant: error: ") and said.count("\n") == 1
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("make", [as_tar, as_zip, as_folder])
@pytest.mark.parametrize("images", ["images/", ""])
def test_office31(tmp_path, capsys, make, images):
    files = office(images)
    extra = {
        "amazon/interest_points/mug/x.mat": b"1",
        "__MACOSX/amazon/images/mug/._frame_0001.jpg": b"2",
        "list.txt": b"3",
    }
    top = {f"domain_adaptation_images/{name}": content for name, content in (files | extra).items()}
    out = tmp_path / "out"
    assert run(out, make(tmp_path / "given", top)) == 0
    said = said_of(capsys)
    assert "amazon 186 (of 2817), webcam 155 (of 795), dslr 62 (of 498)" in said
    assert "amazon/train: 155 images, 31 classes, 5 images a class amazon/test: 31 images, 31 classes, 1 images" in said
    found = contents(out)
    del found[prepared.NOTE]
    back = {}
    for name, content in found.items():
        domain, side, label, file = name.split("/")
        assert side in ("train", "test")
        back[f"{domain}/{images}{label}/{file}"] = content  # the bytes and the names as they were
    assert back == files and len(found) == len(files)
    assert Counter(name.split("/")[1] for name in found)["test"] == 31 * 3  # of 6, 5, 2: a fifth, at least one


def test_the_split_is_that_of_lifequant_tasks(tmp_path, monkeypatch):
    """The CSVs of the unpacked folder name the images that ``images`` copies, whatever the archive's form."""
    raw = as_folder(tmp_path / "raw", office())
    monkeypatch.chdir(tmp_path)
    assert run(Path("out"), raw, "office31", "--seed", "3") == 0
    for source in ("train", "test"):
        words = ["--source", source, "--output_csv", "o.csv", "--domains", "webcam,amazon,dslr", "--seed", "3"]
        for folder in ("raw", "out"):
            assert main_tasks([*words, "--data_dir", folder, "--output_dir", f"csv_{folder}"]) == 0
        for task in ("0", "1", "2"):
            both = [(tmp_path / f"csv_{folder}" / f"o_{source}{task}.csv").read_text() for folder in ("raw", "out")]
            assert both[0].replace("/images/", "/") == both[1].replace(f"/{source}/", "/")
    assert json.loads((tmp_path / "csv_raw" / "dataset.json").read_text())["domains"] == ["webcam", "amazon", "dslr"]


def test_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    source = as_tar(tmp_path / "given.tar.gz", office())
    assert run(tmp_path / "whole", source) == 0
    write, left = prepared.write_all, iter(range(100))

    def interrupt(files):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(files)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "write_all", interrupt)
        assert run(out, source) == 130
    assert len(contents(out)) == 100
    cut = next((out / "amazon" / "train").rglob("*.jpg"))
    cut.write_bytes(cut.read_bytes()[:-7])
    capsys.readouterr()
    assert run(out, source) == 0
    assert "98 of 403 images are there" in said_of(capsys)
    assert contents(out) == contents(tmp_path / "whole")
    assert run(out, source) == 0
    assert "complete already" in said_of(capsys)
    assert "begun with other images" in refused(capsys, out, source, "office31", "--seed", "1")
    assert "holds office31" in refused(capsys, out, source, "imageclef_da")
    stranger = out / "webcam" / "test" / "mug" / "mine.jpg"
    stranger.touch()
    assert "mine.jpg" in refused(capsys, out, source)
    assert "did not write" in refused(capsys, as_folder(tmp_path / "raw", office()), source)


def test_what_is_not_office31(tmp_path, capsys):
    def said(files, make=as_zip):
        place = tmp_path / f"given{len(list(tmp_path.iterdir()))}"
        words = refused(capsys, tmp_path / "out", make(place, files))
        assert not (tmp_path / "out").exists()
        return words

    assert "not Office-31: no images of amazon" in said({"cifar-10-batches-py/data_batch_1": b"1"})
    assert "no images of dslr (amazon, webcam, dslr" in said(office(few={"amazon": 2, "webcam": 2}))
    ten = office(classes=office31.CLASSES[:10])
    first = "lacks the class 'headphones', 'keyboard', 'laptop_computer' and 18 more"
    assert f"not Office-31: amazon {first}" in said(ten)
    lacking = {name: content for name, content in office().items() if "dslr/images/mug" not in name}
    assert "not Office-31: dslr lacks the class 'mug'" in said(lacking)
    assert "webcam has also the class 'cat'" in said(office() | {"webcam/images/cat/1.jpg": b"1"})
    assert "dslr/mug: one image" in said(
        {name: content for name, content in office().items() if "dslr/images/mug/frame_0002" not in name}
    )
    both = {f"{top}/{name}": content for top in ("a", "b") for name, content in office().items()}
    assert "are of one class and have one name: name the folder" in said(both)
    for name in ("../../amazon/images/mug/x.jpg", "/etc/x.jpg", "amazon\\..\\..\\x.jpg"):
        for make in (as_tar, as_zip):
            assert "a path outside of it" in said(office() | {name: b"1"}, make)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("given")) == []


def test_what_is_no_archive(tmp_path, capsys):
    whole = as_tar(tmp_path / "whole.tar.gz", office()).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.zip").write_text("no archive")
    spoilt = bytearray(as_zip(tmp_path / "whole.zip", office()).read_bytes())
    spoilt[200] ^= 255  # in the first image
    (tmp_path / "spoilt.zip").write_bytes(spoilt)
    for name, word in (
        ("cut.tar.gz", "damaged"),
        ("text.zip", "damaged"),
        ("spoilt.zip", "damaged"),
        ("nowhere", "no such"),
    ):
        assert word in refused(capsys, tmp_path / "out", tmp_path / name)
    assert run_main(main_prepare, ["--dataset", "office31", "--out", str(tmp_path / "out")]) == 2
    assert "--source is missing: name the archive of Office-31" in capsys.readouterr().err


def test_links_lead_nowhere(tmp_path, capsys):
    """A link in a tar is left out, and a folder that links to itself is read once."""
    path = as_tar(tmp_path / "given.tar.gz", office())
    with tarfile.open(tmp_path / "linked.tar", "w") as tar, tarfile.open(path) as given:
        for entry in given:
            tar.addfile(entry, given.extractfile(entry))
        link = tarfile.TarInfo("amazon/images/mug/secret.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert run(tmp_path / "a", tmp_path / "linked.tar") == 0 and run(tmp_path / "b", path) == 0
    raw = as_folder(tmp_path / "raw", office())
    (raw / "amazon" / "loop").symlink_to(raw)
    assert run(tmp_path / "c", raw) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def clef(domains: str = "bcip") -> dict[str, bytes]:
    """Five images a class; the lists of b and c name class folders that the archive lacks, as the official ones do."""
    files = {}
    for domain in domains:
        lines = []
        for label in range(12):
            for number in range(5):
                file = f"{domain}{label}_{number}.JPEG"
                files[f"image_CLEF/{domain}/{file}"] = jpeg(20 * label, 50 * number, ord(domain))
                lines.append(f"{domain}/{f'{label:03d}.thing/' if domain in 'bc' else ''}{file} {label}")
        if domain == "p":
            lines += [f"p/p3_{number}.JPEG 6" for number in range(3)]  # boats that are cars too
        files[f"image_CLEF/list/{domain}List.txt"] = "\n".join([*lines, ""]).encode()
    return files


@pytest.mark.parametrize("make", [as_tar, as_zip, as_folder])
def test_imageclef(tmp_path, capsys, make):
    files = clef()
    assert run(tmp_path / "out", make(tmp_path / "given", files), "imageclef_da") == 0
    assert "b 60 (of 600), c 60 (of 600), i 60 (of 600), p 63 (of 600)" in said_of(capsys)
    found = contents(tmp_path / "out")
    del found[prepared.NOTE]
    assert len(found) == 243
    for name, content in found.items():
        domain, _, label, file = name.split("/")
        assert content == files[f"image_CLEF/{domain}/{file}"]
        assert label == CLEF[int(file[1:].split("_")[0])] or (domain, label, file[:3]) == ("p", "car", "p3_")
    at = {
        side: {name.split("/", 3)[-1] for name in found if name.startswith(f"p/{side}")} for side in ("train", "test")
    }
    assert not at["train"] & at["test"] and len(at["test"]) == 12 + 1  # 20 % of five, and of the eight cars


def test_imageclef_without_b(tmp_path, capsys):
    """Many copies have three domains."""
    assert run(tmp_path / "out", as_zip(tmp_path / "given", clef("cip")), "imageclef_da") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["c", "i", "p"]


def test_what_is_not_imageclef(tmp_path, capsys):
    def said(change, domains="bcip"):
        files = clef(domains)
        change(files)
        place = tmp_path / f"given{len(list(tmp_path.iterdir()))}"
        return refused(capsys, tmp_path / "out", as_zip(place, files), "imageclef_da")

    lists = "image_CLEF/list/iList.txt"
    assert "no images of c" in said(lambda files: None, "bip")
    assert "iList.txt, line 1: the image i/i0_0.JPEG is not in it" in said(
        lambda files: files.pop("image_CLEF/i/i0_0.JPEG")
    )
    assert "line 1: 'i/i0_0.JPEG 12' is not a path and a label of 0 to 11" in said(
        lambda files: files.update({lists: b"i/i0_0.JPEG 12\n"})
    )
    assert "i lacks the class 'bike', 'bird', 'boat' and 8 more" in said(
        lambda files: files.update({lists: b"i/i0_0.JPEG 0\n"})
    )
    assert "is not UTF-8" in said(lambda files: files.update({lists: b"\xff\xfe"}))
    assert "two lists" in said(lambda files: files.update({"image_CLEF/i_list.txt": b""}))
    assert "not ImageCLEF-DA" in refused(capsys, tmp_path / "out", as_zip(tmp_path / "o", office()), "imageclef_da")


def tiny_imagenet(classes: int = 200) -> dict[str, bytes]:
    top, files, lines = "tiny-imagenet-200", {}, []
    for label in range(classes):
        wnid = f"n{label:08d}"
        for number in range(2):
            files[f"{top}/train/{wnid}/images/{wnid}_{number}.JPEG"] = f"{label} {number}".encode()
        files[f"{top}/train/{wnid}/{wnid}_boxes.txt"] = b"\n"
        files[f"{top}/val/images/val_{label}.JPEG"] = f"val {label}".encode()
        lines.append(f"val_{label}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    files[f"{top}/val/val_annotations.txt"] = "".join(lines).encode()
    return files | {f"{top}/test/images/test_0.JPEG": b"no label", f"{top}/words.txt": b"n0\tx\n"}


def test_tiny_imagenet(tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, as_zip(tmp_path / "given.zip", tiny_imagenet()), "tinyimagenet") == 0
    assert "train 400 (of 100000), test 200 (of 10000)" in said_of(capsys)
    assert (out / "train" / "n00000007" / "n00000007_1.JPEG").read_bytes() == b"7 1"
    assert (out / "test" / "n00000007" / "val_7.JPEG").read_bytes() == b"val 7"
    assert len(contents(out)) == 601
    few = as_zip(tmp_path / "few.zip", tiny_imagenet(199))
    assert "not Tiny ImageNet: 199 classes, and it has 200" in refused(capsys, tmp_path / "x", few, "tinyimagenet")
    files = tiny_imagenet()
    files["tiny-imagenet-200/val/val_annotations.txt"] = b"val_0.JPEG n0\n"
    assert "'val_0.JPEG n0' is not an image, a tab" in refused(
        capsys, tmp_path / "x", as_zip(tmp_path / "y.zip", files), "tinyimagenet"
    )
    other = as_zip(tmp_path / "office.zip", office())
    assert "0 files val/val_annotations.txt" in refused(capsys, tmp_path / "x", other, "tinyimagenet")
