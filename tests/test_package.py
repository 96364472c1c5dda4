"""The command from a bare copy that nobody installed, and what a wheel holds."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import lifequant

TOP = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What of the project a run or a wheel needs."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(TOP / "lifequant", folder / "lifequant", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "resnet-20-cifar-10/main.py"):
        if (TOP / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(TOP / name, folder / name)
    return folder


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """By a Python that sees the installed packages, but (-S) no editable installation of this one."""
    environment = {**os.environ, "PYTHONPATH": str(Path(np.__file__).parents[1])}
    return subprocess.run([sys.executable, "-S", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_bare_copy(copy, tmp_path):
    """main.py from any folder, ``python -m lifequant`` from the copy's top: the same help, the same error."""
    hidden = run(["-c", "import lifequant"], tmp_path)
    assert hidden.returncode != 0 and "ModuleNotFoundError" in hidden.stderr
    main = str(copy / "resnet-20-cifar-10" / "main.py")
    by_file, by_module = run([main, "--help"], tmp_path), run(["-m", "lifequant", "train", "--help"], copy)
    assert by_file.returncode == by_module.returncode == 0, by_file.stderr + by_module.stderr
    assert by_file.stdout == by_module.stdout and "--ll_method" in by_file.stdout and by_file.stderr == ""
    wrong = run([main, "--csv_dri", "x"], tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "lifequant: error: unknown flag --csv_dri; did you mean '--csv_dir'? (--help lists all)\n"
    assert list(tmp_path.iterdir()) == []


def test_main_is_thin():
    assert len((TOP / "resnet-20-cifar-10" / "main.py").read_text().splitlines()) < 20


def test_import_has_no_side_effect(tmp_path):
    """Importing the package imports no torch, reads no arguments, writes nothing, sets no seed or thread count."""
    code = "import sys, lifequant; assert 'torch' not in sys.modules; import torch; before = torch.get_num_threads(), \
        torch.random.get_rng_state().sum(); import lifequant.train, lifequant.options; lifequant.load; \
        assert before == (torch.get_num_threads(), torch.random.get_rng_state().sum())"
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    words = [sys.executable, "-c", code, "--no-such-flag"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_public(tmp_path):
    """``dir`` shows it and nothing else, also once modules are imported; each name is there; the version is the package's."""
    assert dir(lifequant) == ["__version__", "calibrate", "export", "fold_batchnorm", "load", "quantize_model"]
    assert all(callable(getattr(lifequant, name)) for name in lifequant.__all__)
    bare = run(["-m", "lifequant", "--version"], TOP)
    assert bare.stdout.startswith("lifequant ")
    declared = re.search(r'^version = "(.+)"$', (TOP / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert lifequant.__version__ in (declared, "not installed")


def test_wheel(copy, tmp_path):
    """Holds the package and nothing else; the console command is its main."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("no setuptools or no pip here to build a wheel with, and a build of its own would need the network")
    words = [
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--quiet",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("lifequant-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "lifequant = lifequant.__main__:main" in archive.read(entry).decode()
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    sources = {path.relative_to(copy).as_posix() for path in (copy / "lifequant").rglob("*") if path.is_file()}
    assert package == {name for name in sources if "__pycache__" not in name}
    assert any("/licenses/LICENSE" in name for name in names)
