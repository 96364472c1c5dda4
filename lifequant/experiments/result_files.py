"""Read the results.json files of runs; write the copies that a sweep shows, a folder for each row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lifequant.checkpointing.run_folder import write_json
from lifequant.common.errors import UserError
from lifequant.experiments.grid import Run
from lifequant.results import schema

COMPACT = "runs.jsonl"  # the results of many runs, one a line
NEEDED = (
    "config",
    "tasks",
    "top1",
    "top1_masked",
    "average_accuracy",
    "forgetting",
    "space_shift",
    "memory_bytes",
    "max_codes_per_tensor",
    "images_per_second",
)


def read(given: str) -> tuple[str, dict[str, Any]]:
    """(the run's name, the content of its results.json); ``given`` is the run's folder or the file. Raises UserError."""
    path = Path(given)
    path = path / "results.json" if path.is_dir() else path
    try:
        results = schema.read(path, NEEDED)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run writes its results.json at its end") from None
    return path.resolve().parent.name, results


def read_all(given: list[str]) -> dict[str, dict[str, Any]]:
    """{name: results}. If two runs' folders have one name, the folders above are added to it. Raises UserError."""
    found = [(Path(path), *read(path)) for path in given]
    names = [name for _, name, _ in found]
    if len(set(names)) < len(names):
        names = [f"{(p if p.is_dir() else p.parent).resolve().parent.name}/{name}" for p, name, _ in found]
    if len(set(names)) < len(names):
        names = [f"{name} {index}" for index, name in enumerate(names)]
    return {name: results for name, (_, _, results) in zip(names, found, strict=True)}


def show_result(view: Path, run: Run, results: dict[str, Any]) -> None:
    """Write the copy, with the run's key, the data set's name and the grid's [tasks]. A source has no row and no copy."""
    if not run.is_source:
        folder = view / run.name
        folder.mkdir(parents=True, exist_ok=True)
        config = {**results["config"], "dataset": run.tasks["dataset"]}
        write_json(
            folder / "results.json", {**results, "config": config, "sweep": run.folder.name, "grid_tasks": run.tasks}
        )


def results_below(folder: Path, needed: Iterable[str]) -> list[tuple[Path, dict[str, Any]]]:
    """[(path, results)] of all runs below a folder, sorted by path: each results.json, each line of each runs.jsonl.

    A line's path is where its results.json lay. Raises UserError for what no run wrote.
    """
    found = [(path, schema.read(path, needed)) for path in folder.rglob("results.json")]
    for file in folder.rglob(COMPACT):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                results = json.loads(line)
                path = file.parent / results.pop("run") / "results.json"
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(
                    f"{file}, line {number}: not the results of a run; report --compact writes them"
                ) from None
            found.append((path, schema.check(results, f"{file}, line {number}", needed)))
    return sorted(found, key=lambda entry: str(entry[0]))


def compact(folder: Path) -> str:
    """The content of a runs.jsonl for all runs below ``folder``: one run a line, without what tables do not show.

    Code histograms are kept of the weights of each row's first seed, which the picture shows. Space shifts are rounded: tables
    have four digits of their mean.
    """
    lines = []
    for path, results in results_below(folder, NEEDED):
        kept = {name: value for name, value in results.items() if name not in ("step_change", "seconds_by_part")}
        first = results["config"].get("seed") == 0
        kept["code_histograms"] = {
            name: histogram
            for name, histogram in results.get("code_histograms", {}).items()
            if first and name.endswith(".weight_quant")
        }
        kept["space_shift"] = {
            layer: [[round(value, 6) for value in row] for row in matrix]
            for layer, matrix in results["space_shift"].items()
        }
        run = path.parent.relative_to(folder).as_posix()
        lines.append(json.dumps({"run": run, **kept}, separators=(",", ":"), allow_nan=False))
    return "\n".join([*lines, ""])


def shown_results(folders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{key: results} of the runs that sweeps have shown in the folders."""
    found = [results for folder in folders for _, results in results_below(Path(folder), ("config", "time_share"))]
    return {results["sweep"]: results for results in found if isinstance(results.get("sweep"), str)}


def clear_former_results(view: Path, runs: Sequence[Run], out: Path) -> None:
    """Remove copies that an earlier version of the grid has shown and this one does not.

    Raises UserError if such a copy is the only one.
    """
    keys = {run.name: run.folder.name for run in runs}
    for path in sorted(view.rglob("results.json")):
        key = json.loads(path.read_text(encoding="utf-8")).get("sweep")
        name = path.parent.relative_to(view).as_posix()
        if name not in keys or keys[name] != key:
            if not list((out / "runs" / str(key)).rglob("results.json")):
                raise UserError(f"{path} is of no run of this grid, and its run's folder is gone: move it away")
            path.unlink()
