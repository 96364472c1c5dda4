"""quickstart.sh and test.sh: which environment they take, what they never replace, and what pip says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
PIP = """import os, sys
print("Collecting noise")
open(os.environ["PIP_CALLED"], "a").write(" ".join(sys.argv[1:]) + "\\n")
sys.exit("no network" if "PIP_FAILS" in os.environ else 0)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A virtual environment with a pip that installs nothing, and notes that it was called."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder)
    pip = packages(folder) / "pip"
    pip.mkdir()
    (pip / "__init__.py").write_text("")
    (pip / "__main__.py").write_text(PIP)
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone with spaces"
    shutil.copytree(TOP / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TOP / "pyproject.toml", folder)
    return folder


def packages(environment: Path) -> Path:
    (folder,) = (environment / "lib").glob("python*/site-packages")
    return folder


def copied(made: Path, folder: Path, origin: str | None = None, editable: bool = True) -> Path:
    """The environment at another place, with lifequant from ``origin`` ("" stands for a wheel from an index)."""
    shutil.copytree(made, folder, symlinks=True)
    if origin is not None:
        note = packages(folder) / "lifequant-0.1.0.dist-info"
        note.mkdir()
        (note / "METADATA").write_text("Metadata-Version: 2.1\nName: lifequant\nVersion: 0.1.0\n")
        if origin:
            (note / "direct_url.json").write_text(json.dumps({"url": origin, "dir_info": {"editable": editable}}))
    return folder


def run(clone: Path, active: Path | None, script: str | None = None, **more: str) -> subprocess.CompletedProcess:
    """A script, or the choice of the environment alone, with the Python that was chosen printed at the end."""
    words = ["bash", f"scripts/{script}"] if script else ["bash", "-c", CHOOSE, str(clone / "scripts" / "x.sh")]
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    env |= {"PIP_CALLED": str(clone / "pip_called"), "PYTHONPATH": str(TOP), **more}
    if active:
        env["VIRTUAL_ENV"] = str(active)
    return subprocess.run(words, cwd=clone, env=env, capture_output=True, text=True, timeout=60)


CHOOSE = "set -euo pipefail; source scripts/_common.sh; use_environment; echo uses $python"


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "gpu_check.sh"])
@pytest.mark.parametrize("origin", ["file:///somewhere/other%20clone", ""], ids=["clone", "wheel"])
def test_another_installation_is_never_replaced(script, origin, made, clone, tmp_path):
    """Neither an editable one nor a wheel: they say what is there and what to do, and stop."""
    active = copied(made, tmp_path / "active", origin)
    done = run(clone, active, script)
    where = "/somewhere/other clone" if origin else "a wheel"
    assert done.returncode == 2 and done.stdout == ""
    assert f"{script}: the active environment {active} has lifequant from {where}, and" in done.stderr
    assert "deactivate" in done.stderr and f"{active}/bin/python -m pip install -e '{clone}'" in done.stderr
    assert not (clone / "pip_called").exists()


def test_own_and_empty_environments_are_used(made, clone, tmp_path):
    """This clone's own installation, by any path; an active environment without lifequant; .venv, wherever it came from."""
    (tmp_path / "link").symlink_to(clone)
    own = copied(made, tmp_path / "own", f"file://{tmp_path}/link".replace(" ", "%20"))
    empty = copied(made, tmp_path / "empty")
    moved = copied(made, clone / ".venv", "file:///where/the/clone/was")
    for active, python in ((own, own), (empty, empty), (None, moved), (moved, moved)):
        for _ in range(2):
            done = run(clone, active, CONDA_PREFIX=str(made))
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1] == f"uses {python}/bin/python" and done.stderr == ""
    assert len((clone / "pip_called").read_text().splitlines()) >= 3


def test_pip_is_quiet_unless_it_fails(made, clone, tmp_path):
    active = copied(made, tmp_path / "active")
    done = run(clone, active)
    assert done.returncode == 0 and "noise" not in done.stdout + done.stderr
    assert done.stdout.startswith(f"installing lifequant and what it needs into {active}")
    assert (clone / "pip_called").read_text().endswith(f"-e {clone}[dev,demo,plot]\n")
    (clone / "pyproject.toml").write_text("# changed")
    done = run(clone, active, PIP_FAILS="1")
    assert done.returncode == 2 and "Collecting noise\nno network\n" in done.stderr
    assert done.stderr.endswith("pip could not install what is needed (its message is above)\n")
