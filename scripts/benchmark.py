"""Images/s of whole training steps: float, every quantizer, every method, other libraries, the published code's scheme.

python scripts/benchmark.py --out docs/benchmark.md --picture docs/benchmark.png

Every contender is a process of its own that builds itself, compiles, warms up and then waits; they take turns, one at a
time, a round after another, each round beginning with another one: whatever slows the machine down slows all of them.
Ratios are taken within a round. Images are random and in memory (published_scheme apart: files, as it would have them).

--inference times other things: the files of ``lifequant export``, by batch size and threads (benchmarking/inference.py).

Rows, chosen by --rows (shell patterns, separated by commas; all that end in _compiled also exist as _eager):
  float_eager, float_compiled   the network in float
  <quantizer>_compiled          the method original with that quantizer at 4 bits, 8 in the first and last layer
  <method>_compiled             the method's whole step in its second task, with replay and importances in place;
  ours_eager                    joint has all tasks in one, and original is the quantizers' rows
  brevitas                      the network with Brevitas's layers, in the same training step (pip install brevitas)
  torch_qat                     the same with torch.ao's fake-quantizers: ranges from moving averages, nothing learned.
                                torchao has no row: its recipes quantize linear layers, not a convolution's weights
  published_scheme              rounding by an autograd.Function, the penalty a loop, .item() at every step, PIL files
brevitas_compiled and torch_qat_compiled can be asked for, and our own rows with _bf16 behind (--amp bf16). --quick has
float_compiled, ours_compiled, published_scheme.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from benchmarking import contenders, report
from tqdm import tqdm

from lifequant import registry
from lifequant.checkpointing import checkpoint, run_folder
from lifequant.common.arguments import Parser, int_at_least, run_main
from lifequant.common.errors import UserError, one_line

WORKER = Path(contenders.__file__)
BATCH = 128
QUICK = {"rows": ",".join(contenders.QUICK), "rounds": 3, "steps": 4, "batch": BATCH}
USUAL = {"rows": "", "rounds": 7, "steps": 10, "batch": BATCH}
OF_TRAINING = ("batch", "steps", "growth")  # flags


class Worker:
    """A contender's process. ``problem`` says why it is not there, if it isn't."""

    def __init__(self, row: str, args: Any) -> None:
        self.row, self.problem, self.start_seconds = row, None, 0.0
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        asked = {"row": row, **{name: getattr(args, name) for name in ("batch", "steps", "device", "model")}}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def wait(self) -> Worker:
        """Until it is ready or known not to come."""
        found = self._answer()
        self.start_seconds = found.get("ready", 0.0)
        self.problem = self.problem or found.get("skipped")
        return self

    def seconds(self, steps: int) -> float | None:
        """The seconds of so many steps now; None, with ``problem`` set, where the process has failed."""
        with contextlib.suppress(BrokenPipeError):  # its last words are read below
            self.process.stdin.write(f"go {steps}\n")
            self.process.stdin.flush()
        return self._answer().get("seconds")

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        lines = [text for text in self.errors.read().decode(errors="replace").splitlines() if text.strip()]
        self.problem = f"failed: {one_line(lines[-1]) if lines else f'exit code {self.process.returncode}'}"
        return {}

    def stop(self) -> None:
        """It ends when its stdin does."""
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def start_all(rows: Sequence[str], args: Any) -> list[Worker]:
    """Start the contenders, as many at a time as there are cores: nothing is measured meanwhile."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers: list[Worker] = []

    def start(row: str) -> Worker:
        workers.append(worker := Worker(row, args))
        return worker.wait()

    try:
        with ThreadPoolExecutor(min(cores, 4)) as pool:
            ready = list(tqdm(pool.map(start, rows), "contenders", len(rows), disable=None))
    except BaseException:
        for worker in workers:
            worker.stop()
        raise
    return ready


def measure(workers: Sequence[Worker], args: Any) -> dict[str, list[float]]:
    """{row: images/s of each round}; a contender that fails on its way is left out, with its ``problem`` set."""
    speeds: dict[str, list[float]] = {worker.row: [] for worker in workers if not worker.problem}
    there = [worker for worker in workers if not worker.problem]
    for round in tqdm(range(args.rounds), "rounds", disable=None):
        shift = round % max(len(there), 1)
        for worker in there[shift:] + there[:shift]:
            if not worker.problem and (seconds := worker.seconds(args.steps)) is not None:
                speeds[worker.row].append(args.steps * args.batch / seconds)
    return {row: values for row, values in speeds.items() if len(values) == args.rounds}


def write(found: dict[str, Any], text: str, args: Any) -> None:
    """Print the tables; --growth measures its own first. The files that --json and --out name."""
    if args.growth:
        from benchmarking import growth

        more, found["growth"] = growth.growth(args.model, args.device)
        text += ("\n" if found.get("rounds") else report.heading(found["machine"], {}) + "\n\n") + more
    write_files(found, text, args)


def write_files(found: dict[str, Any], text: str, args: Any) -> None:
    print(text, flush=True)
    if args.json:
        run_folder.write_json(Path(args.json), found)
    if args.out:
        checkpoint.write_bytes(Path(args.out), text.encode())


def benchmark(args: Any) -> None:
    rows = contenders.choose(args.rows.split(",")) if args.rows else contenders.default_rows()
    workers = start_all(rows, args)
    try:
        machine = report.machine(args)
        speeds = measure(workers, args)
    finally:
        for worker in workers:
            worker.stop()
    problems = {worker.row: worker.problem for worker in workers if worker.problem}
    ready = {worker.row: round(worker.start_seconds, 1) for worker in workers if worker.row in speeds}
    found = report.summary(speeds, problems, ready, machine, args)
    write(found, report.markdown(found), args)
    if args.picture and speeds:
        report.picture(found, Path(args.picture))
    failed = [row for row, problem in problems.items() if problem.startswith("failed")]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} contenders failed: {', '.join(failed)} (the table says how)")


def benchmark_inference(args: Any) -> None:
    from benchmarking import inference

    if given := [f"--{name}" for name in OF_TRAINING if getattr(args, name)]:
        raise UserError(f"--inference: {', '.join(given)} is of training: leave it out")
    usual = inference.QUICK if args.quick else inference.USUAL
    args.rounds = args.rounds or usual["rounds"]
    rows = contenders.choose((args.rows or usual["rows"]).split(","), inference.ROWS)
    found, text = inference.benchmark(rows, args)
    write_files(found, text, args)
    if args.picture:
        inference.picture(found, Path(args.picture))


def main(argv: Sequence[str]) -> None:
    first, rest = __doc__.split("\n", 1)
    parser = Parser(prog="benchmark.py", description=first, epilog=rest.split("\n\n")[-1])
    parser.add_argument(
        "--rows", help="rows to time, separated by commas; shell patterns (default: all but _eager ones)"
    )
    parser.add_argument("--quick", action="store_true", help=f"few rows and steps, under two minutes: {QUICK['rows']}")
    parser.add_argument("--batch", type=int_at_least(8), help=f"images a step (default: {BATCH})")
    parser.add_argument("--rounds", type=int_at_least(1), help=f"turns of each contender (default: {USUAL['rounds']})")
    parser.add_argument("--steps", type=int_at_least(1), help=f"steps of a turn (default: {USUAL['steps']})")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    parser.add_argument("--model", default="resnet20", help="the network")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--out", metavar="FILE.md", help="write the table here, too")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the table here (matplotlib)")
    parser.add_argument(
        "--growth", action="store_true", help="how a step, memory and a task's end grow (with --rows besides)"
    )
    parser.add_argument(
        "--inference", action="store_true", help="images/s of the files of lifequant export, beside float ones"
    )
    args = parser.parse_args(argv)
    registry.model(args.model)  # a name that isn't known is said before anything starts
    if args.picture:
        report.check_picture(Path(args.picture))
    if args.inference:
        return benchmark_inference(args)
    for name, value in (QUICK if args.quick else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.growth and not args.rows:  # alone; with --rows or --quick besides
        return write({"machine": report.machine(args)}, "", args)
    return benchmark(args)


if __name__ == "__main__":
    sys.exit(run_main(main))
