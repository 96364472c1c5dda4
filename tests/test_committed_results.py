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

FOLDERS = sorted(path.stem for path in GRIDS.glob("[0-9]*.toml"))


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
    """All runs of a grid are there, each with the key that the grid gives to it: its settings are those that were run."""
    have = {
        path.parent.relative_to(RESULTS / name).as_posix(): key
        for key, path in _shown.had([str(RESULTS / name)]).items()
    }
    runs = _grid.runs(_grid.read(GRIDS / f"{name}.toml"), tmp_path, name, have.values())
    assert have == {run.name: run.folder.name for run in runs if not run.is_source}


def test_all_searches_can_be_read():
    for path in sorted(GRIDS.glob("search_*.toml")):
        assert _grid.read(path, rows=False)
