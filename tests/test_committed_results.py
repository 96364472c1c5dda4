"""The committed tables are what scripts/report.py makes of the committed results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
RESULTS = TOP / "resnet-20-cifar-10" / "results"
GRIDS = TOP / "resnet-20-cifar-10" / "experiments"
sys.path.insert(0, str(TOP / "scripts"))
import _grid  # noqa: E402
import _shown  # noqa: E402
import report  # noqa: E402

FOLDERS = sorted(path.parent.name for path in RESULTS.glob("*/report.md"))


@pytest.mark.parametrize("name", FOLDERS)
def test_tables(name, tmp_path):
    pytest.importorskip("matplotlib", reason="the report names its pictures: matplotlib is not there (extra plot)")
    report.main([str(RESULTS / name), "--out", str(tmp_path)])
    for file in ("report.md", "table.csv"):
        assert (tmp_path / file).read_bytes() == (RESULTS / name / file).read_bytes(), file
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {path.name for path in (RESULTS / name).glob("*.png")} and pictures


@pytest.mark.parametrize("name", FOLDERS)
def test_results_are_the_grids(name, tmp_path):
    """Each has the key that its grid gives to it: the settings in the file are those that were run."""
    have = _shown.had([str(RESULTS / name)])
    runs = {run.name: run for run in _grid.runs(_grid.read(GRIDS / f"{name}.toml"), tmp_path, name, have)}
    for key, path in have.items():
        assert runs[path.parent.relative_to(RESULTS / name).as_posix()].folder.name == key


def test_all_grids_can_be_read(tmp_path):
    for path in sorted(GRIDS.glob("[0-9]*.toml")):
        assert _grid.runs(_grid.read(path), tmp_path, path.name)
    for path in sorted(GRIDS.glob("search_*.toml")):
        assert _grid.read(path, rows=False)
