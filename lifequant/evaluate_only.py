"""--test_only: the accuracies of a trained model, with the settings of the run that trained it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lifequant import options
from lifequant.checkpointing import checkpoint
from lifequant.common.errors import UserError
from lifequant.common.safe_files import read_text
from lifequant.config import DATA, RUN, Config
from lifequant.data.dataset import load_dataset
from lifequant.evaluation.evaluate import Scores, evaluate
from lifequant.predict import load
from lifequant.results.table import CLASS_IL, TASK_IL, wrapped
from lifequant.runtime import distributed
from lifequant.runtime.device import memory_explained, pick_device
from lifequant.training import initialize

OF_DATA = (*(f.name for f in fields(Config) if f.metadata and f.metadata["group"] == DATA), "seed")
FOLDERS = ("csv_dir", "data_dir", "cache_dir")
MOST_BYTES = 2**20  # of a config.json


def test(config: Config, notes: Sequence[str] = (), typed: Collection[str] | None = None) -> Scores:
    """--test_only: print the accuracies of job_dir's model, or of --source_file's; writes nothing. Raises UserError.

    The network is as the model's file says. The data are as config.json beside it says, but for the settings whose names
    are in ``typed`` (by default those of ``config`` that are no defaults).
    """
    if typed is None:
        typed = {f.name for f in fields(Config) if f.metadata and getattr(config, f.name) != f.default}
    device = pick_device(config)
    distributed.join(device)
    for line in notes:
        print(line)
    path = _model_file(config)
    model = load(path).to(device)
    checkpoint.refuse_nonfinite(path, model)
    state = checkpoint.read(path, "model")
    run = {**settings_of_run(path), **state["config"], "image_size": state["preprocessing"]["image_size"]}
    for line in _contradictions(config, run, typed):
        print(wrapped(line))
    dataset = distributed.one_first(lambda: load_dataset(with_data_of(config, run, typed, path), device, print))
    if len(model.class_names) != dataset.num_classes:
        raise UserError(
            f"{path}: it has {len(model.class_names)} classes, the data set has {dataset.num_classes}: name its task CSVs "
            "by --csv_dir"
        )
    with memory_explained(lambda: ("evaluation", f"model {path}")):
        scores = evaluate(model, dataset, config.eval_batch_size, with_error=False)
    print(_table(dataset.domains or [f"task {id}" for id in dataset.ids], scores), f"model: {path}", sep="\n")
    return scores


def _table(names: Sequence[str], scores: Scores) -> str:
    """A line a task, and their average."""
    rows = list(zip(names, scores.top1, scores.masked, scores.top5, strict=True))
    means = [sum(values) / len(rows) for values in (scores.top1, scores.masked, scores.top5)]
    first = max(14, *(len(name) + 2 for name in names))
    lines = [f"{'accuracy (%)':<{first}}{CLASS_IL:>10}{TASK_IL:>10}{'top-5':>10}"]
    lines += [f"{name:<{first}}" + "".join(f"{value:10.2f}" for value in values) for name, *values in rows]
    lines.append(f"{'average':<{first}}" + "".join(f"{value:10.2f}" for value in means))
    return "\n".join(lines)


def _model_file(config: Config) -> Path:
    if config.source_file:
        return initialize.find_source(config)
    job = Path(config.job_dir)
    path = checkpoint.find_model(job / "model_best.pt")
    if path is None:
        rungs = sorted(job.glob("*bit/model_best.pt"), key=lambda file: file.stat().st_mtime)  # of --bit_schedule
        hint = f" (--job_dir {rungs[-1].parent} has one)" if rungs else ""
        raise UserError(f"--test_only: no model_best.pt in --job_dir {job}{hint}, and no --source_file")
    return path


def _folder_of(path: Path) -> Path:
    """The run's folder of a model file."""
    folder = path.absolute().parent
    return folder.parent if folder.name == "checkpoint" else folder


def settings_of_run(path: Path) -> dict[str, Any]:
    """config.json of the run that wrote the model; {} where there is none. Raises UserError."""
    file = _folder_of(path) / "config.json"
    try:
        found = json.loads(read_text(file, MOST_BYTES))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name), str | None) for name in (*FOLDERS, "job_dir")
    ):
        raise UserError(f"{file}: not the settings of a run: move it away, and give --csv_dir and --data_dir")
    return found


def _contradictions(config: Config, run: dict[str, Any], typed: Collection[str]) -> list[str]:
    """A line on what was typed and is not as the run had it, where that matters."""
    lost, kept = [], []
    for f in fields(Config):
        ours, theirs = getattr(config, f.name), run.get(f.name)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        if f.name not in typed or f.metadata["free"] or f.name not in run or ours == theirs:
            continue
        obeyed = f.name in OF_DATA and f.name != "image_size"
        if obeyed or f.metadata["group"] != RUN:
            (kept if obeyed else lost).append(
                f"--{f.name} {ours} (its run: {'not given' if theirs is None else theirs})"
            )
    own = {name: value for name, value in config.options.items() if value not in (None, False, run.get(name))}
    lost += [f"--{name} {value} {_of_run(run.get(name))}" for name, value in own.items()]
    lines = [f"of no effect, for the model's own settings hold: {', '.join(lost)}"] * bool(lost)
    return lines + [f"other than in the model's run: {', '.join(kept)}"] * bool(kept)


def _of_run(value: Any) -> str:
    return f"(its run: {'not given' if value is None else value})"


def with_data_of(config: Config, run: dict[str, Any], typed: Collection[str], path: Path) -> Config:
    """``config`` with the run's data where nothing else was typed. Raises UserError."""
    names = [name for name in OF_DATA if name in run and (name not in typed or name == "image_size")]
    try:
        data = options.make(**{name: run[name] for name in names})
    except UserError as error:
        raise UserError(f"{_folder_of(path) / 'config.json'}: {error}") from None
    changed = {name: getattr(data, name) for name in names}
    begin = _began_in(run, path)
    for name in FOLDERS:
        if changed.get(name) and (begin / changed[name]).is_dir():
            changed[name] = str(begin / changed[name])
    if "csv_dir" in changed and not Path(changed["csv_dir"]).is_dir():
        raise UserError(
            f"{_folder_of(path) / 'config.json'} says the task CSVs are in {changed['csv_dir']}, which is not there: name "
            "their folder by --csv_dir"
        )
    return replace(config, **changed)


def _began_in(run: dict[str, Any], path: Path) -> Path:
    """The folder that the run's relative paths begin at, as far as its own folder tells; else the working folder."""
    job, here = Path(run.get("job_dir") or ""), _folder_of(path).resolve()
    if not job.is_absolute() and job.parts and here.parts[-len(job.parts) :] == job.parts:
        return Path(*here.parts[: -len(job.parts)])
    return Path()
