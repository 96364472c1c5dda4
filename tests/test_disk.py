"""A disk that fills up, a folder made read-only, a quota, in mid-run: one line, what is there is whole, and it goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.equal import read, same
from support.tiny import arguments, settings, train

from lifequant.checkpointing import checkpoint
from lifequant.common.files import write_all
from lifequant.runtime.tensorboard import Curves

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
LONG = {"method": "replay", "num_epochs": 6, "checkpoint_seconds": 0, "print_freq": 2}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no small disk can be made here: {error}")
    if done.returncode:
        pytest.skip(f"no small disk can be made here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(tiny, folder, **LONG)
    return folder


def start(argv: list[str], before: Sequence[str] = (), **more: Any) -> subprocess.Popen:
    words = [*before, sys.executable, "-m", "lifequant", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, **more
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(3000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come")


def refused(process: subprocess.Popen, *words: str) -> None:
    """It ended by one line, and did not hang."""
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2, error
    assert error.count("\n") == 1 and "--resume True" in error
    for word in words:
        assert word in error


def ends_the_same(argv: list[str], folder: Path, straight: Path) -> None:
    process = start([*argv, "--resume", "True"])
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    same(read(folder), read(straight))
    for name in ("task0.pt", "last.pt"):
        same(*(checkpoint.read(place / "checkpoint" / name, "run") for place in (folder, straight)), name)
    assert scalars(folder) == scalars(straight)


def scalars(folder: Path) -> dict:
    found = {}
    for place in {path.parent for path in folder.rglob("events.*")}:
        events = accumulator.EventAccumulator(str(place), {"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            if not tag.startswith("5_speed/"):
                found[place.relative_to(folder), tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    return found


def test_a_disk_that_fills_up(tiny, straight, tmp_path):
    with small_disk(tmp_path / "disk", 80) as disk:
        argv = arguments(settings(tiny, disk / "run", **LONG))
        process = start(argv)
        wait_for(disk / "run/checkpoint/previous.pt", process)
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        refused(process, str(disk / "run"), "No space left on device")
        checkpoint.read_last(disk / "run/checkpoint/last.pt", print)
        assert not list(disk.rglob("*.tmp"))
        (disk / "filler").unlink()
        ends_the_same(argv, disk / "run", straight)


def test_a_folder_made_read_only(tiny, straight, tmp_path):
    """For someone whom permissions bind, as they do not bind root."""
    bound = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may write everywhere, and there is no setpriv to take that from it")
        bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    argv, folder = arguments(settings(tiny, tmp_path / "run", **LONG)), tmp_path / "run" / "checkpoint"
    process = start(argv, before=bound)
    wait_for(folder / "previous.pt", process)
    folder.chmod(0o555)
    refused(process, "Permission denied")
    folder.chmod(0o755)
    ends_the_same(argv, tmp_path / "run", straight)


def test_a_quota(tiny, straight, tmp_path):
    """Files may not grow beyond 100 kB: no checkpoint can be written, the event files can."""
    argv = arguments(settings(tiny, tmp_path / "run", **LONG))
    process = start(argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    refused(process, "File too large")
    assert not list((tmp_path / "run").rglob("*.pt")) and not list((tmp_path / "run").rglob("*.tmp"))
    ends_the_same(argv, tmp_path / "run", straight)


def test_curves_on_a_full_disk(tmp_path):
    """An error names the file and leaves no half event; once there is room all points are written, none twice."""
    with small_disk(tmp_path / "disk", 1) as disk:
        curves = Curves(disk / "task0")
        curves.add_scalar("loss", 1.0, 1)
        curves.flush()
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for step in range(2, 202):
            curves.add_scalar("loss", float(step), step)
        with pytest.raises(OSError, match="No space left") as caught:
            curves.flush()
        assert caught.value.filename == str(curves.path) and curves.path.stat().st_size == curves.size
        filler.unlink()
        curves.close()
        found = accumulator.EventAccumulator(str(disk / "task0"), {"scalars": 0}).Reload().Scalars("loss")
        assert [(e.step, e.value) for e in found] == [(step, float(step)) for step in range(1, 202)]


def test_several_files_whole_or_not_at_all(tmp_path):
    """As a generator writes its CSVs."""
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "a.csv").write_text("old")
        with pytest.raises(OSError, match="No space left"):
            write_all({disk / "a.csv": "new", disk / "b.csv": np.zeros(2_000_000, np.uint8).tobytes()})
        assert {path.name: path.read_text() for path in disk.iterdir()} == {"a.csv": "old"}
