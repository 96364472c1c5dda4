"""The results that a sweep shows: copies of its runs' results.json, a folder a row, for report.py and for later sweeps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _grid import Run

from lifequant.checkpointing.run_folder import write_json
from lifequant.common.errors import UserError
from lifequant.results import schema


def show(view: Path, run: Run, results: dict[str, Any]) -> None:
    """The copy, with the run's key and the data's name; a source has no row."""
    if not run.is_source:
        where = view / run.name
        where.mkdir(parents=True, exist_ok=True)
        config = {**results["config"], "dataset": run.tasks["dataset"]}
        write_json(where / "results.json", {**results, "config": config, "sweep": run.folder.name})


def had(folders: Sequence[str]) -> dict[str, Path]:
    """{key: results.json} of the runs that sweeps have shown in the folders."""
    found = {}
    for path in sorted(path for folder in folders for path in Path(folder).rglob("results.json")):
        key = schema.read(path, ("config", "time_share")).get("sweep")
        if isinstance(key, str):
            found[key] = path
    return found


def clear_old(view: Path, runs: Sequence[Run], out: Path) -> None:
    """Remove what a former version of the grid has shown and this one has not, where it can be had again.

    Raises UserError where it is the only copy.
    """
    keys = {run.name: run.folder.name for run in runs}
    for path in sorted(view.rglob("results.json")):
        key = json.loads(path.read_text(encoding="utf-8")).get("sweep")
        name = path.parent.relative_to(view).as_posix()
        if name not in keys or keys[name] != key:
            if not list((out / "runs" / str(key)).rglob("results.json")):
                raise UserError(f"{path} is of no run of this grid, and its run's folder is gone: move it away")
            path.unlink()
