"""A run's folder: whether it may be used, where a run goes on, and what another run's state is good for."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lifequant import registry
from lifequant.checkpointing import checkpoint
from lifequant.common import fault_injection
from lifequant.common.errors import UserError
from lifequant.common.files import lock
from lifequant.config import ADDED, RESUME_JOB_DIR, Config, free_names

PARTS = ("config.json", "results.json", "logger.log", "model_best.pt", "checkpoint", "run")  # all that a run leaves
LOCK = ".lock"
NEEDED_BYTES = 50_000_000  # a run of three tasks: its checkpoints and curves


@contextlib.contextmanager
def locked(job: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep ``job`` for this process alone, by a lock on job_dir/.lock that the system lifts when the process dies.

    A folder that was made for the lock is removed with it if it is still empty. Raises UserError if another run has it.
    """
    if job.exists() and not job.is_dir():
        yield
        return

    def busy(owner: str) -> None:
        raise UserError(f"--job_dir {job} is in use by {owner}: wait for it, or choose another --job_dir")

    made = [folder for folder in (job, *job.parents) if not folder.exists()]
    job.mkdir(parents=True, exist_ok=True)
    try:
        with lock(job / LOCK, busy) as dead:
            if dead:
                say(f"--job_dir {job}: {dead} had it and has died; taken over")
            yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it is in use now
                folder.rmdir()


@contextlib.contextmanager
def explain_disk_errors(job: Path) -> Iterator[None]:
    """Inside, what the file system refuses (a full disk, a quota, a read-only folder) becomes a UserError that says how to
    go on."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"--job_dir {job}: {error.strerror}{where}: the run has stopped, its last checkpoint is whole; once it can be "
            "written to again, go on with --resume True"
        ) from error


def check(config: Config, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Check whether job_dir may be used, and change nothing.

    Returns the state to go on with, None for a new run. Raises UserError.
    """
    job = Path(config.job_dir)
    if job.exists() and not job.is_dir():
        raise UserError(f"--job_dir {job}: not a folder")
    if config.reset and config.resume:
        raise UserError("--reset and --resume contradict each other: begin anew, or go on")
    if config.reset:
        _spare_sources(config, job)
    elif not config.resume and _holds_run(job):
        raise UserError(
            f"--job_dir {job} holds another run: go on with it (--resume), clear it (--reset), or choose another --job_dir"
        )
    nearest = next(folder for folder in (job.resolve(), *job.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(nearest).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"--job_dir {job}: {free / 1e6:.0f} MB are free on this disk, {NEEDED_BYTES / 1e6:.0f} MB are needed"
        )
    return _resumed(config, job, say) if config.resume else None


def begin(config: Config, past: Path | None = None, tasks: int = 0) -> None:
    """Clear what another run left and write config.json.

    For a run that goes on elsewhere (--from, --resume PATH), the checkpoints of the first ``tasks`` are copied from ``past``.
    """
    job = Path(config.job_dir)
    for name in (
        checkpoint.LAST,
        checkpoint.PREVIOUS,
    ):  # first: half cleared, the folder must not pass for a whole run's
        (job / "checkpoint" / name).unlink(missing_ok=True)
    for part in PARTS:
        path = job / part
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    (job / "checkpoint").mkdir(parents=True, exist_ok=True)
    for task in range(tasks):
        checkpoint.write_bytes(task_file(job, task), (past / f"task{task}.pt").read_bytes())
    fault_injection.point("begin")
    write_json(job / "config.json", config.asdict())


def _holds_run(job: Path) -> bool:
    """Whether the folder has anything that ``begin`` would clear."""
    return any((job / part).exists() for part in PARTS)


def task_file(job: str | Path, task: int) -> Path:
    """The checkpoint at the end of a task."""
    return Path(job) / "checkpoint" / f"task{task}.pt"


def finish(config: Config, tasks: int) -> None:
    """Remove the checkpoints that a run of that many tasks needs no more once its results are written."""
    folder = Path(config.job_dir) / "checkpoint"
    (folder / checkpoint.PREVIOUS).unlink(missing_ok=True)
    if config.keep_checkpoints == "last":
        for task in range(tasks):
            task_file(config.job_dir, task).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; raises ValueError for NaN."""
    checkpoint.write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def _spare_sources(config: Config, job: Path) -> None:
    sources = {
        "--source_file": config.source_file and Path(config.source_dir) / config.source_file,
        "--from": config.from_run,
    }
    for flag, source in sources.items():
        path = Path(source).resolve() if source else None
        if path and job.resolve() in (path, *path.parents):
            raise UserError(f"--reset would clear {job}, where {flag} {source} lies: choose another --job_dir")


def resumed_from(config: Config) -> Path:
    """The checkpoint that --resume goes on with."""
    if config.resume == RESUME_JOB_DIR:
        return Path(config.job_dir) / "checkpoint" / checkpoint.LAST
    path = Path(config.resume)
    return path / "checkpoint" / checkpoint.LAST if path.is_dir() else path


def moves(config: Config) -> bool:
    """Whether --resume PATH goes on in another folder than the one the checkpoint is in."""
    return Path(config.job_dir).resolve() not in resumed_from(config).resolve().parents


def _resumed(config: Config, job: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    path = resumed_from(config)
    there = path.is_file() or (path.name == checkpoint.LAST and path.with_name(checkpoint.PREVIOUS).is_file())
    if not there and config.resume != RESUME_JOB_DIR:
        raise UserError(f"--resume {config.resume}: no checkpoint there")
    if moves(config) and _holds_run(job):
        raise UserError(f"--job_dir {job} holds another run than --resume {path}: choose another --job_dir")
    if not there:
        for part in ("results.json", "model_best.pt"):
            if (job / part).exists():
                raise UserError(
                    f"--resume: {job} has {part}, but no checkpoint to go on with: clear it (--reset), or choose another --job_dir"
                )
        say(f"--resume: no checkpoint in {job} yet; the run starts anew")
        return None
    state, path = checkpoint.read_last(path, say)
    ours, theirs, free = config.asdict(), ADDED | state["config"], free_names()
    for name in sorted({*ours, *theirs} - free):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{path}: {name} was {theirs.get(name)}, now it is {ours.get(name)}; a run goes on only with its own settings"
            )
    finished = (job / "results.json").is_file()  # which may have kept its last checkpoint alone
    lacking = [task for task in range(state["task_index"]) if not (path.parent / f"task{task}.pt").is_file()]
    if lacking and not finished:
        raise UserError(
            f"{path}: task{lacking[0]}.pt is not beside it: name a checkpoint in the folder that its run wrote"
        )
    return state


# Settings that matter only from task 1 on, and settings that data_key or another setting stands for.
_LATER = {
    "method",
    "penalty",
    "ll_lambda",
    "replay_rate",
    "buffer_size",
    "replay_batch",
    "replay_selection",
    "memory_budget",
    "distill",
    "distill_temperature",
}
_ELSEWHERE = {"dataset", "num_tasks", "task_id", "num_classes", "ll_method", "preset", "balanced", "arch", "start_task"}


def fork_conflict(config: Config, theirs: dict[str, Any]) -> str | None:
    """Why ``config`` can't begin at its ``start_task`` with the state of a run with the settings ``theirs``; None if it can."""
    ours, theirs = config.asdict(), ADDED | theirs
    apart = _ELSEWHERE | free_names() | (_LATER if config.start_task == 1 else set())
    if config.start_task == 1:
        apart |= {
            name
            for name in ours | theirs
            if name in own_flags(config.method, config.penalty) | own_flags(theirs["method"], theirs["penalty"])
        }
    for name in [name for name in {**ours, **theirs} if name not in apart]:  # in the order of Config
        if ours.get(name) != theirs.get(name):
            return f"its {name} is {theirs.get(name)}, this run's {ours.get(name)}: they differ before task {config.start_task}"
    for name in (config.method, theirs["method"]):
        method = registry.method(name)
        if method.joint:
            return f"{name} trains all tasks at once, it can't be forked"
        if method.per_step_state and config.method != theirs["method"]:
            return f"{name} gathers state at every step, which the other method lacks"
    return None


def own_flags(method: str, penalty: str) -> set[str]:
    """Names of the settings that only this method and this penalty have."""
    own = set(registry.own_flags("method", method))
    return own if penalty == "none" else own | set(registry.own_flags("penalty", penalty))


def fork(config: Config, data_key: list[str]) -> dict[str, Any]:
    """The state of --from at the end of task ``start_task - 1``. Raises UserError where the two runs differ until then."""
    run = Path(config.from_run)
    path = task_file(run, config.start_task - 1)
    if not path.is_file():
        there = path.with_name(checkpoint.LAST).is_file()
        hint = ": a run with --keep_checkpoints last does not keep it; tasks, the default, does" if there else ""
        raise UserError(
            f"--from {run}: no {path.relative_to(run)}, the state at the end of task {config.start_task - 1}{hint}"
        )
    state = checkpoint.read(path, "run")
    if why := fork_conflict(config, state["config"]):
        raise UserError(f"--from {run}: {why}")
    needed = slice(None) if config.start_task > 1 else slice(1)
    if state["data_key"][needed] != data_key[needed]:
        raise UserError(f"--from {run}: it was trained on other images or tasks")
    return {**state, "data_key": data_key}
