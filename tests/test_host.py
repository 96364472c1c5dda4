"""What a run leaves on its host: files in job_dir, the cache and --out alone, with the modes that umask says, and in what
is passed on (results.json, model_best.pt) neither the environment nor a path of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import arguments, train, write_csvs, write_images

import lifequant
from lifequant.common import files

TOP = Path(lifequant.__file__).resolve().parents[1]
GENERATE = "import sys; from lifequant.common.arguments import run_main; from lifequant.data.create.tasks import main_tasks as m; sys.exit(run_main(m))"
CONVERT = (
    "import torch, lifequant; q = lifequant.quantize_model(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()));"
    "lifequant.calibrate(q, torch.rand(2, 3, 8, 8))"
)


def listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if "torchinductor" not in str(path)}


@pytest.fixture
def read_only_home(tmp_path):
    """A home that even root can't write to, where mounting is permitted."""
    home = tmp_path / "home"
    home.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=4k", "none", str(home)], capture_output=True)
    yield home, mounted.returncode == 0
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", str(home)], check=True)


def test_nothing_is_written_elsewhere(read_only_home, tmp_path):
    """Training, the generator and a conversion, each in a process of its own, with a home that can't be written."""
    home, is_read_only = read_only_home
    if not is_read_only and os.geteuid() == 0:
        pytest.skip("root may not mount here, and root may write to any folder")
    if not is_read_only:
        home.chmod(0o555)
    images = write_images(tmp_path / "images")
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    here.mkdir()
    temporary.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "LIFEQUANT"))}
    env |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(TOP), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*argv: str) -> None:
        done = subprocess.run([sys.executable, *argv], cwd=here, env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr

    for source in ("train", "test"):
        flags = {"data_dir": images, "output_csv": "tiny.csv", "num_tasks": 2, "diminish_rate": 50, "source": source}
        run("-c", GENERATE, *arguments({**flags, "output_dir": tmp_path / "csvs"}))
    flags = {
        "csv_dir": tmp_path / "csvs",
        "data_dir": images,
        "job_dir": tmp_path / "job",
        "cache_dir": tmp_path / "cache",
    }
    flags |= {"image_size": 16, "num_epochs": 1, "train_batch_size": 8, "compile": "off", "device": "cpu"}
    before = listing(images)
    run("-m", "lifequant", *arguments(flags))
    run("-c", CONVERT)
    assert listing(images) == before
    assert not listing(here) and not listing(temporary) and not listing(home)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "images", "here", "temporary", "csvs", "job", "cache"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_modes_honour_umask(umask, mode, tmp_path, tiny):
    former = os.umask(umask)
    try:
        write_csvs(tiny.images, tmp_path / "csvs")
        files.write_all({tmp_path / "one.txt": "text"})
        train(tiny, tmp_path / "job", method="original", num_tasks=1, cache_dir=tmp_path / "cache")
    finally:
        os.umask(former)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 12
    wrong = {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777) for path in written
             if path.stat().st_mode & 0o777 != mode}  # fmt: skip
    assert not wrong


def test_results_name_no_machine(tmp_path, monkeypatch):
    """Folders and variables with names that can be found again; logger.log and config.json may have them."""
    for name in ("HOME", "USER", "LOGNAME", "HOSTNAME", "LIFEQUANT_SECRET"):
        monkeypatch.setenv(name, f"marker_{name.lower()}")
    top = tmp_path / "marker_folder"
    images = write_images(top / "marker_images")
    from support.tiny import Tiny

    csvs = write_csvs(images, top / "marker_csvs")
    job = top / "marker_job"
    train(Tiny(images, csvs, csvs), job, cache_dir=top / "marker_cache")
    machine = [b"marker_", str(tmp_path).encode(), str(TOP).encode()]
    for name in ("results.json", "model_best.pt", "checkpoint/model_best.pt"):
        content = (job / name).read_bytes()
        assert not [word for word in machine if word in content], name
    assert b"marker_job" in (job / "config.json").read_bytes()  # the test finds what is there


def test_only_prepare_images_downloads():
    """No other file of the package imports what speaks to a network, torch.distributed apart."""
    for path in (TOP / "lifequant").rglob("*.py"):
        text = path.read_text()
        for word in ("urllib", "http.client", "requests", "socket", "torch.hub", "download=True", "download_url"):
            assert path.name in ("cifar.py", "distributed.py") or f"import {word}" not in text, (path, word)
    text = (TOP / "lifequant" / "data" / "create" / "cifar.py").read_text()
    assert "tgz_md5" in text and "extractall" not in text and "extract(" not in text
