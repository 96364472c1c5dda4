"""Run a grid of runs, a few at a time. A finished run is never run again.

    lifequant sweep GRID.toml --data_dir data_dir/cifar100 --out experiment/campaign --jobs 2
    lifequant sweep GRID.toml --data_dir data_dir/cifar100 --out experiment/campaign --dry_run
    lifequant sweep GRID.toml --data_dir data_dir/cifar100 --out experiment/campaign --slurm --partition gpu --gpus 1

grid.py describes the file. A run has a folder OUT/runs/KEY. The key stands for its settings without paths, its tasks and its
source, so two grids with the same OUT share the runs that they have in common. Runs with the same task 0 train it once: the
others fork from the first (--start_task 1 --from) and have the same numbers as alone (tests/test_sweep.py). With --compile
they may round differently where a method's loss is another graph, and a quantized network soon magnifies that. Each run is a
process with --resume True and its share of the cores, so a sweep that was stopped goes on where its runs stood. Copies of the
finished runs' results are in OUT/GRID/ROW/.../seedN/results.json, for the report. A run that failed is moved to
OUT/failed/KEY, with its last line in failed.txt, and is left out until --retry; the others go on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lifequant import presets
from lifequant.common.arguments import Parser, int_at_least
from lifequant.common.commands import command
from lifequant.common.errors import UserError, closest, one_line
from lifequant.common.text import duration, wrapped
from lifequant.experiments import result_files
from lifequant.experiments.estimate import GUESS, Estimate, said_left, spent
from lifequant.experiments.executor import Executor, Local
from lifequant.experiments.grid import Run, checked, forked, read_grid, runs_of_grid, task_seeds
from lifequant.experiments.grid_tasks import write_tasks
from lifequant.experiments.slurm import Slurm

LOG = f"sweep{os.getpid()}.log"  # what a run said to this sweep, in its folder
IN_USE = "is in use by"  # another sweep, or one that was killed, has this run under way
WAIT = 0.3  # seconds between looks
TELL = 5.0  # seconds after which the time left is shown anew, on a terminal
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # without tqdm's own guess of the time left


class Sweep:
    """The runs of a grid, and the state of each."""

    def __init__(
        self,
        runs: list[Run],
        data_dir: Path,
        out: Path,
        view: Path,
        executor: Executor,
        have: dict[str, dict[str, Any]],
    ) -> None:
        self.data_dir, self.out, self.view, self.executor, self.have = data_dir, out, view, executor, have
        self.runs = self.begun_anew(runs)
        self.estimate = Estimate(self.runs, data_dir, max(1, (os.cpu_count() or 1) // executor.slots))
        self.times: dict[Path, float] = {}  # seconds of the finished runs
        for run in self.runs:
            if self.finished(run):
                self.learn(run, None)
        self.waiting = [run for run in self.runs if run.folder not in self.times and not self.failure(run)]
        self.going: dict[Path, tuple[Run, Any]] = {}
        self.began: dict[Path, float] = {}  # when those under way were started
        self.told = 0.0
        self.later: dict[Path, float] = {}  # in use elsewhere: when to look again

    def file(self, run: Run) -> Path:
        """results.json of a run; that of progressive bits is its last rung's."""
        schedule = str(run.flags.get("bit_schedule", ""))
        return run.folder / (f"{schedule.split(',')[-1]}bit" if schedule else "") / "results.json"

    def finished(self, run: Run) -> bool:
        return self.file(run).is_file() or run.folder.name in self.have

    def results(self, run: Run) -> dict[str, Any]:
        file = self.file(run)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else self.have[run.folder.name]

    def failure(self, run: Run) -> str | None:
        """The last line of a run that failed, or of its source that failed; None if none did."""
        for folder in (run.folder, *run.after):
            if folder != run.flags.get("from_run") and (file := self.failed_file(folder)).is_file():
                return file.read_text(encoding="utf-8").strip()
        return None

    def failed_file(self, folder: Path) -> Path:
        """Where the last line of the run of this folder is, if it failed."""
        return self.out / "failed" / folder.name / "failed.txt"

    def begun_anew(self, runs: list[Run]) -> list[Run]:
        """``runs``, of which those that were to begin with task 0 of a run that failed train it themselves, one for all."""
        found, leaders = [], []
        for run in runs:
            leader = run.flags.get("from_run")
            if leader and self.failed_file(leader).is_file():
                flags = {name: value for name, value in run.flags.items() if name not in ("start_task", "from_run")}
                run = replace(run, flags=flags, after=tuple(folder for folder in run.after if folder != leader))
                run = forked(run, checked(run, str(self.out)), leaders)
            found.append(run)
        return found

    def learn(self, run: Run, wall: float | None) -> None:
        """Note what a finished run took."""
        results = self.results(run)
        self.times[run.folder] = spent(results)
        self.estimate.learn(run, results, wall, self.file(run).is_file())

    def left(self) -> float:
        """Seconds until the last run has ended."""
        now = time.monotonic()
        going = [
            (run, now - self.began[run.folder], said_left(run.folder / LOG, time.time()))
            for run, _ in self.going.values()
        ]
        return self.estimate.left(self.waiting, going, self.executor.slots)

    def go(self) -> None:
        """Run until nothing is left to do."""
        signal.signal(signal.SIGTERM, interrupted)
        for run in self.runs:
            if run.folder in self.times:  # another grid may have run it
                result_files.show_result(self.view, run, self.results(run))
        for run in {run.csv_dir: run for run in self.waiting}.values():
            write_tasks(run.tasks, run.task_seed, self.data_dir, run.csv_dir)
        done = len(self.runs) - len(self.waiting)
        with tqdm(total=len(self.runs), initial=done, unit="run", bar_format=BAR) as bar:
            try:
                while self.waiting or self.going:
                    if self.advance(bar) or (sys.stderr.isatty() and time.monotonic() > self.told + TELL):
                        self.tell(bar)
                    time.sleep(WAIT)
            except BaseException:
                self.executor.stop([handle for _, handle in self.going.values()])
                raise

    def advance(self, bar: tqdm) -> bool:
        """Note what has ended and start what can be started. Returns whether there was anything to do."""
        ended = [(run, code) for run, at in self.going.values() if (code := self.executor.code(at)) is not None]
        for run, code in ended:
            del self.going[run.folder]
            self.ended(run, code, bar)
        ready = [run for run in self.waiting if self.ready(run)][: self.executor.slots - len(self.going)]
        for run in ready:
            run.folder.mkdir(parents=True, exist_ok=True)
            self.began[run.folder] = time.monotonic()
            self.going[run.folder] = run, self.executor.start(run.arguments(self.data_dir), run.folder / LOG)
        lost = [run for run in self.waiting if self.failure(run)]
        if lost:
            bar.update(len(lost))
        self.waiting = [run for run in self.waiting if run not in ready and run not in lost]
        return bool(ended or ready or lost)

    def ready(self, run: Run) -> bool:
        return all(folder in self.times for folder in run.after) and time.monotonic() >= self.later.get(run.folder, 0)

    def tell(self, bar: tqdm) -> None:
        """Show the time left and the failures behind the progress bar."""
        self.told = time.monotonic()
        failed = sum(self.failure(run) is not None for run in self.runs)
        guess = "" if self.times else " (roughly, until a run has finished)"
        left = [f"about {duration(self.left())} left{guess}"] if self.waiting or self.going else []
        bar.set_postfix_str(", ".join([*left, *[f"{failed} failed"] * bool(failed)]))

    def ended(self, run: Run, code: int, bar: tqdm) -> None:
        if code == 0 and self.finished(run):
            self.learn(run, None if self.executor.queues else time.monotonic() - self.began[run.folder])
            result_files.show_result(self.view, run, self.results(run))
        elif IN_USE in (line := last_line(run.folder / LOG)):
            self.later[run.folder] = time.monotonic() + 10
            self.waiting.append(run)
            return
        else:
            kept = self.failed_file(run.folder).parent
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            run.folder.rename(kept)
            (kept / "failed.txt").write_text(f"exit code {code}: {line}\n", encoding="utf-8")
            tqdm.write(f"{run.name} failed: {line}")
            self.waiting = self.begun_anew(self.waiting)
        bar.update()


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return one_line(next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing"))


def plan(sweep: Sweep) -> str:
    """The plan: a line for each run, and how long all of them will take."""
    lines = []
    for run in sweep.runs:
        state = "finished" if run.folder in sweep.times else "failed" if sweep.failure(run) else "to run"
        first = " after task 0 of another" if run.flags.get("start_task") else ""
        lines.append(f"{state:<8} {run.folder.name} {run.name}{first}")
    basis = "as fast as those finished" if sweep.times else f"guessed at {GUESS:.0f} images a second and core"
    about = f": about {duration(sweep.left())}, {basis}" if sweep.waiting else ""
    lines.append(task_seeds(sweep.runs))
    total = f"{len(sweep.runs)} runs, {len(sweep.waiting)} to do, {sweep.executor.slots} at a time{about}"
    lines.append(wrapped(total))
    return "\n".join(lines)


def interrupted(*_: Any) -> None:
    """SIGTERM ends a sweep as Ctrl-C does."""
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    parser = Parser(description="Run a grid of runs, a few at a time.")
    parser.add_argument("grid", help="a TOML file that names the runs, or a recipe by its name (lifequant list)")
    parser.add_argument("--data_dir", required=True, help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--out", required=True, help="folder of the runs and of their results; grids may share it")
    parser.add_argument(
        "--dry_run", action="store_true", help="show the runs and the time they would take; write nothing"
    )
    parser.add_argument("--jobs", type=int_at_least(1), default=1, help="runs at a time (with --slurm: in the queue)")
    parser.add_argument(
        "--have", nargs="+", default=[], metavar="FOLDER", help="results of runs that are not to run again"
    )
    parser.add_argument("--retry", action="store_true", help="run those again that failed")
    parser.add_argument("--slurm", action="store_true", help="submit the runs to Slurm (pip install lifequant[slurm])")
    parser.add_argument("--partition", help="of Slurm")
    parser.add_argument("--gpus", type=int_at_least(0), default=0, help="GPUs a run, of Slurm")
    parser.add_argument("--cpus", type=int_at_least(1), default=2, help="cores a run, of Slurm")
    parser.add_argument(
        "--minutes", type=int_at_least(1), default=240, help="a run's time limit, of Slurm; it is requeued then"
    )
    parser.add_argument(
        "--cluster", choices=("slurm", "local"), default="slurm", help="local: try the way to Slurm without it"
    )
    args = parser.parse_args(argv)
    grid = presets.recipes().get(args.grid, Path(args.grid))
    if not grid.exists():
        near = closest(args.grid, presets.recipes())
        raise UserError(f"{args.grid}: no such file, and no recipe of that name{near} ({', '.join(presets.recipes())})")
    out, data_dir = Path(args.out).resolve(), Path(args.data_dir).resolve()
    have = result_files.shown_results(args.have)
    runs = runs_of_grid(read_grid(grid), out, args.grid, have)
    if args.slurm:
        executor: Executor = Slurm(args, out / "slurm")
    else:
        executor = Local(args.jobs)
    if args.retry and not args.dry_run:
        for run in runs:
            shutil.rmtree(out / "failed" / run.folder.name, ignore_errors=True)
    sweep = Sweep(runs, data_dir, out, out / grid.stem, executor, have)
    print(plan(sweep), flush=True)
    if args.dry_run:
        return 0
    result_files.clear_former_results(sweep.view, runs, out)
    try:
        sweep.go()
    except KeyboardInterrupt:
        print(f"lifequant: the sweep is stopped; go on with: {command('sweep', *argv)}", file=sys.stderr)
        raise
    failed = {run.name: line for run in runs if (line := sweep.failure(run))}
    for name, line in failed.items():
        print(f"failed: {name}: {line}")
    print(f"{len(sweep.times)} of {len(runs)} runs finished: {args.out}/{grid.stem}")
    return 1 if failed else 0
