"""``lifequant cache``: the place and size of decoded images are said, listed and cleared, and nothing else is touched."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from support.tiny import SIDE, TEST, TRAIN, Tiny

from lifequant.__main__ import command
from lifequant.common.arguments import run_main
from lifequant.data import image_cache

FOREIGN = ("mine.npy", "tiny-train-0123.npy", "notes.txt")  # may lie beside, as --cache_dir is any folder


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> tuple[Path, list[str]]:
    """A cache of the tiny images, with foreign files beside; and what was said when it was made."""
    said: list[str] = []
    cache = tmp_path / "cache"
    for side in ("train", "test"):
        names = sorted(path.relative_to(tiny.images).as_posix() for path in (tiny.images / side).rglob("*.png"))
        for _ in range(2):  # the second time it is there
            image_cache.load_images(tiny.images, names, SIDE, cache, f"tiny-{side}", said.append)
    for name in FOREIGN:
        (cache / name).write_bytes(b"foreign")
    return cache, said


def printed(capsys: pytest.CaptureFixture, *argv: str) -> list[str]:
    capsys.readouterr()
    assert run_main(command, ["cache", *argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_place_and_size_are_said_once(folder):
    cache, said = folder
    sizes = [f"{6 * count * 3 * SIDE * SIDE / 1e6:.1f} MB" for count in (TRAIN, TEST)]
    assert said == [
        f"tiny-{side}: {6 * count} decoded images, {size}, are kept in {cache} (see lifequant cache)"
        for side, count, size in zip(("train", "test"), (TRAIN, TEST), sizes, strict=True)
    ]


def test_list(folder, capsys, monkeypatch):
    """A line for each file; also of the user's own folder."""
    cache, _ = folder
    lines = printed(capsys, "--cache_dir", str(cache))
    assert lines[0] == f"{cache}: 2 files, 0.1 MB"
    today = date.today().isoformat()
    assert [line.split()[:5] for line in lines[1:]] == [
        ["tiny-test", "24", "images", "of", "16x16"],
        ["tiny-train", "48", "images", "of", "16x16"],
    ]
    assert all(len(line) <= 80 and line.endswith(today) for line in lines[1:])
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    cache.rename(cache.with_name("lifequant"))
    assert printed(capsys)[1:] == lines[1:]


def test_clear(folder, capsys):
    """What is written now is kept; damaged files and what killed builds left goes too; foreign files never."""
    cache, _ = folder
    (test,) = cache.glob("tiny-test-*.npy")
    (left := cache / f"tiny-train-{'0' * 24}.npy.part").write_bytes(b"half")
    test.write_bytes(b"damaged")
    assert "not whole" in printed(capsys, "--cache_dir", str(cache))[1]
    code = (
        "import sys; from pathlib import Path; from lifequant.common.files import lock\n"
        "with lock(Path(sys.argv[1]), print): print('held', flush=True); input()"
    )
    words = [sys.executable, "-c", code, str(test.with_name(f"{test.name}.lock"))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        lines = printed(capsys, "--cache_dir", str(cache), "--clear")
        other.communicate("\n")
    assert lines[0] == f"{cache}: removed 2 files, 0.0 MB"
    assert f"{test.name} is kept: process {other.pid}" in lines[1] and len(lines) == 2
    assert test.exists() and not left.exists()
    assert printed(capsys, "--cache_dir", str(cache), "--clear")[0].endswith("removed 1 file, 0.0 MB")
    assert {path.name for path in cache.iterdir()} == set(FOREIGN)
    assert printed(capsys, "--cache_dir", str(cache / "nowhere")) == [f"{cache}/nowhere: 0 files, 0.0 MB"]
