"""The committed tables are what scripts/report.py makes of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from lifequant.experiments import grid, report, result_files

TOP = Path(__file__).resolve().parents[1]
RESULTS = TOP / "resnet-20-cifar-10" / "results"
GRIDS = TOP / "resnet-20-cifar-10" / "experiments"

ALL = sorted(path.stem for path in GRIDS.glob("[0-9]*.toml"))
FOLDERS = [name for name in ALL if (RESULTS / name).is_dir()]


@pytest.mark.parametrize("name", FOLDERS)
def test_tables(name, tmp_path):
    report.main([str(RESULTS / name), "--no_pictures", "--out", str(tmp_path)])
    for file in ("report.md", "table.csv"):
        assert (tmp_path / file).read_bytes() == (RESULTS / name / file).read_bytes(), file


def test_they_are_small():
    """What a clone brings along, under 3.5 MB."""
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 3_500_000


@pytest.mark.parametrize("name", FOLDERS)
def test_results_are_the_grids(name, tmp_path):
    """All runs of a grid are there, each with the key that the grid gives to it: its settings are those that were run."""
    shown = result_files.shown_results([str(RESULTS / name)])
    paths = result_files.results_below(RESULTS / name, ("config",))
    have = {path.parent.relative_to(RESULTS / name).as_posix(): results["sweep"] for path, results in paths}
    runs = grid.runs_of_grid(grid.read_grid(GRIDS / f"{name}.toml"), tmp_path, name, shown)
    assert have == {run.name: run.folder.name for run in runs if not run.is_source}


def test_what_was_not_run_is_said(tmp_path):
    """A grid without results can be planned, and findings.md says that it has none."""
    for name in set(ALL) - set(FOLDERS):
        assert grid.runs_of_grid(grid.read_grid(GRIDS / f"{name}.toml"), tmp_path, name)
        assert f"`{name}`" in (TOP / "docs" / "findings.md").read_text().split("## Not run yet")[1].split("## ")[0]


def test_all_searches_can_be_read():
    for path in sorted(GRIDS.glob("search_*.toml")):
        assert grid.read_grid(path, rows=False)
