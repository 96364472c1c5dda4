"""A grid is a TOML file that stands for many runs. This is what it looks like:

title = "what is asked"
[tasks]                        # the task CSVs: flags of lifeLongDataGeneator.py
dataset = "cifar100"
num_tasks = 3
diminish_rate = 50
task_seed = 0                  # the generator's --seed: the class order and the choice of images, the same for all runs (default: 0);
                               # "seed" makes the tasks with each run's own seed, so that seeds differ in their tasks too
images_per_class = 100         # and held_out = 0.2 where a share of them is to stand for the test images
                               # (domains = ["clean", "grey"] in place of num_tasks and diminish_rate: a task a domain)
[source]                       # the 32-bit model of task 0 that all runs begin from, one a seed; may be left out
num_epochs = 20                # or file = "weights.pth", float weights of elsewhere, with sha256 = "..." where they are to be these
[flags]                        # flags of all runs; lists are taken in all combinations
bitW = [4, 2]
seed = [0, 1, 2]
[rows.ours]                    # a row with flags of its own, lists too; source = false begins from nothing
[rows."ours, no penalty"]
penalty = "none"
[exclude."joint has one row"]  # combinations to leave out, and why
row = "joint"
bitW = 2
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lifequant import registry
from lifequant.checkpointing import run_folder
from lifequant.common.errors import UserError, closest
from lifequant.config import ADDED, Config, free_names
from lifequant.experiments import grid_tasks
from lifequant.options import make

PARTS = ("title", "tasks", "source", "flags", "rows", "exclude")
OF_A_SEARCH = ("title", "tasks", "source", "flags", "strength", "start", "parts")
LIKE_THE_RUNS = (
    "image_size",
    "train_batch_size",
    "eval_batch_size",
    "target_model",
    "shortcut",
    "stem",
    "lt_gamma",
    "compile",
    "cache_dir",
)
OURS = ("csv_dir", "data_dir", "job_dir", "resume", "reset", "start_task", "from_run", "source_file", "source_dir",
        "keep_checkpoints")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of a sweep. Its results are shown under ``name``; it runs in ``folder``, which has the run's key as its name."""

    name: str
    flags: dict[str, Any]
    tasks: dict[str, Any]
    folder: Path
    after: tuple[Path, ...] = ()  # folders of runs that must have finished

    @property
    def seed(self) -> int:
        return self.flags.get("seed", 0)

    @property
    def task_seed(self) -> int:
        return grid_tasks.task_seed(self.tasks, self.seed)

    @property
    def is_source(self) -> bool:
        return self.flags.get("num_tasks") == 1

    @property
    def csv_dir(self) -> Path:
        """The folder of its task CSVs, which differ by their seed."""
        return self.folder.parents[1] / "tasks" / digest([grid_tasks.without_seed(self.tasks), self.task_seed])

    def arguments(self, data_dir: Path) -> list[str]:
        """The command line of the run. Raises UserError for flags that the run would refuse."""
        flags = {**self.flags, "csv_dir": self.csv_dir, "data_dir": data_dir, "job_dir": self.folder, "resume": True}
        return [
            word
            for name, value in flags.items()
            for word in ("--from" if name == "from_run" else f"--{name}", str(value))
        ]


def digest(value: Any) -> str:
    """12 hexadecimal digits that stand for a JSON-ready value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def task_seeds(runs: Sequence[Run]) -> str:
    """What seeds the tasks are made with, in words."""
    seeds = ", ".join(map(str, sorted({run.task_seed for run in runs})))
    if any(run.tasks.get("task_seed") == grid_tasks.OF_THE_RUN for run in runs):
        return f"tasks: each run's are made with its own seed ({seeds})"
    return f"tasks: made with seed {seeds}, the same for all runs"


def read_grid(path: Path, rows: bool = True) -> dict[str, Any]:
    """The content of a grid's file, after a check of its parts; ``rows=False`` reads the grid of a search. Raises UserError."""
    parts = PARTS if rows else OF_A_SEARCH
    try:
        import tomllib
    except ImportError:
        raise UserError("a grid is read with tomllib: Python 3.11 or newer is needed") from None
    try:
        grid = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    for name, value in grid.items():
        if name not in parts:
            raise UserError(f"{path}: unknown part {name!r}{closest(name, parts)} (known: {', '.join(parts)})")
        if name != "title" and not isinstance(value, dict):
            raise UserError(f"{path}: {name} is to be a table, [{name}]")
    grid_tasks.check(grid.get("tasks", {}), path)
    tables = ("rows",) if rows else ("strength",) if "strength" in grid else ("start", "parts")
    for table in tables:
        of = grid.get(table)
        if not of or (table != "start" and not all(isinstance(row, dict) for row in of.values())):
            raise UserError(f"{path}: nothing in [{table}], or what is no table; [{table}.NAME] begins one")
    return grid


def runs_of_grid(grid: dict[str, Any], out: Path, where: str, have: Container[str] = ()) -> list[Run]:
    """All runs of a grid in an order in which each comes after the run that it begins from.

    ``have``: keys of runs of which the results alone are there, so that none can begin from them.
    """
    found: dict[Path, Run] = {}
    leaders: list[tuple[Run, Config]] = []
    used = set()
    for row, flags, axes in combinations(grid):
        name = "/".join(
            [row, *(f"{flag}{flags[flag]}" for flag in axes if flag != "seed"), f"seed{flags.get('seed', 0)}"]
        )
        if excluding := [why for why, rule in grid.get("exclude", {}).items() if matches(rule, row, flags)]:
            used.update(excluding)
            continue
        run, source = planned(name, flags, grid, out, where)
        if source:
            found.setdefault(source.folder, source)
        config = checked(run, where)
        if run.folder in found:
            raise UserError(f"{where}: {name} and {found[run.folder].name} are the same run")
        found[run.folder] = replace(run, after=()) if run.folder.name in have else forked(run, config, leaders)
    if unused := sorted(set(grid.get("exclude", {})) - used):
        raise UserError(f"{where}: the exclusion {unused[0]!r} leaves nothing out")
    needed = {folder for run in found.values() for folder in run.after}
    kept = [run for run in found.values() if not run.is_source or run.folder in needed]
    return sorted(kept, key=lambda run: run.seed)  # a sweep that is stopped has whole tables of fewer seeds


def combinations(grid: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """(row, flags, names of the flags that were lists)."""
    for row, own in grid["rows"].items():
        flags = {**grid.get("flags", {}), **own}
        axes = [name for name, value in flags.items() if isinstance(value, list)]
        for values in itertools.product(*(flags[name] for name in axes)):
            yield row, {**flags, **dict(zip(axes, values, strict=True))}, axes


def matches(rule: dict[str, Any], row: str, flags: dict[str, Any]) -> bool:
    """Whether every entry of an exclusion, a value or a list of values, is true of the run."""
    is_so = {**flags, "row": row}
    return all(is_so.get(name) in (value if isinstance(value, list) else [value]) for name, value in rule.items())


def planned(name: str, flags: dict[str, Any], grid: dict[str, Any], out: Path, where: str) -> tuple[Run, Run | None]:
    """The run, and the source that it begins from; None if it begins from nothing."""
    flags = dict(flags)
    wanted = flags.pop("source", True) and "source" in grid
    tasks = grid["tasks"]
    if taken := sorted(set(OURS) & set(flags)):
        raise UserError(f"{where}: {name}: {taken[0]} is the sweep's own to set: leave it out")
    if not wanted:
        return Run(name, flags, tasks, run_folder_of(flags, tasks, None, out, where, name)), None
    if "file" in grid["source"]:
        flags["source_file"] = Path(grid["source"]["file"]).expanduser()
        folder = run_folder_of(flags, tasks, file_key(grid["source"], where), out, where, name)
        return Run(name, flags, tasks, folder), None
    inherited = {key: flags[key] for key in LIKE_THE_RUNS if key in flags}
    base = {"method": "original", "bitW": 32, "num_tasks": 1, "seed": flags.get("seed", 0)}
    settings = {**inherited, **base, **grid["source"]}
    label = f"source/seed{settings['seed']}"
    source = Run(label, settings, tasks, run_folder_of(settings, tasks, None, out, where, label))
    folder = run_folder_of(flags, tasks, source.folder.name, out, where, name)
    flags["source_file"] = source.folder / "model_best.pt"
    return Run(name, flags, tasks, folder, (source.folder,)), source


def file_key(source: dict[str, Any], where: str) -> str:
    """Eight hexadecimal digits that stand for the file that all runs begin from. Raises UserError if it is another one."""
    path, named = Path(source["file"]).expanduser(), str(source.get("sha256", ""))
    if unknown := sorted(set(source) - {"file", "sha256"}):
        raise UserError(f"{where}: [source] has a file, so it can't have {unknown[0]!r} (known: file, sha256)")
    if not path.is_file():
        if len(named) < 8:
            raise UserError(f"{where}: [source]: no file {path}")
        return named[:8]  # enough to plan the runs, and to know their results
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(named):
        raise UserError(f"{where}: [source]: {path} is another file: its sha256 is {found}, not {named}")
    return found[:8]


def run_folder_of(
    flags: dict[str, Any], tasks: dict[str, Any], source: str | None, out: Path, where: str, name: str
) -> Path:
    """The folder of a run. The key in its name stands for the run's settings, tasks and source.

    Paths, and settings that may change when a run is resumed, are not part of the key. Nor is the seed of the tasks where it
    is the run's: the tasks are then the same whichever way the grid says it.
    """
    try:
        config = make(**flags).asdict(paths=False)
    except UserError as error:
        raise UserError(f"{where}: {name}: {error}") from None
    kept = {
        key: value for key, value in config.items() if key not in free_names() and (key, value) not in ADDED.items()
    }
    task_seed = grid_tasks.task_seed(tasks, config["seed"])
    tasks = grid_tasks.without_seed(tasks) | ({} if task_seed == config["seed"] else {"task_seed": task_seed})
    return out / "runs" / digest([kept, tasks, source])


def checked(run: Run, where: str) -> Config:
    try:
        return make(**run.flags)
    except UserError as error:
        raise UserError(f"{where}: {run.name}: {error}") from None


def forked(run: Run, config: Config, leaders: list[tuple[Run, Config]]) -> Run:
    """``run``, or the run that begins at task 1 if another run has the same task 0; else others may begin from this one."""
    at_one = replace(config, start_task=1)
    if grid_tasks.number(run.tasks) > 1 and not config.bit_schedule:
        for leader, settings in leaders:
            if leader.after == run.after and run_folder.fork_conflict(at_one, settings.asdict()) is None:
                flags = {**run.flags, "start_task": 1, "from_run": leader.folder}
                return replace(run, flags=flags, after=(*run.after, leader.folder))
        if not registry.method(config.method).joint:
            leaders.append((run, config))
    return run
