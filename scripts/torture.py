"""Does a run that is killed again and again end as if nothing had been? Exit code 1 where anything differs.

python scripts/torture.py --kills 20 --method ours     # 20 whole runs, each killed at least once, on scikit-learn's digits
python scripts/torture.py --kills 4 --method bit_schedule

A run is killed first at points of lifequant/common/fault_injection.py (a checkpoint's writing, the importance estimate, a task's change, the
cache's building, the last table ...), shared out so that each has its turn, then up to twice at a random moment, by SIGKILL
or SIGTERM. It is resumed after each, and compared with the uninterrupted run: every tensor, results.json but for times, the curves.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant.common.arguments import Parser, int_at_least, run_main
from lifequant.common.errors import UserError
from lifequant.common.fault_injection import POINTS

TOP = Path(__file__).resolve().parents[1]
SETTINGS = {"bitW": 4, "num_epochs": 1, "train_batch_size": 32, "image_size": 16, "print_freq": 3}
SETTINGS |= {"checkpoint_seconds": 0.3, "compile": "off", "device": "cpu"}
ENDINGS = {  # SIGTERM may come after the run's end, when its handler is no longer there
    signal.SIGKILL: [-signal.SIGKILL],
    signal.SIGTERM: [143, -signal.SIGTERM],
}
LIMIT = 600  # seconds for a process; more is a hang


class Torture:
    """The runs of one method in a folder, what was done to them and how long an exit after SIGTERM took at most."""

    def __init__(self, folder: Path, method: str, seed: int, more: Sequence[str]) -> None:
        self.folder, self.random = folder, random.Random(seed)
        ladder = method == "bit_schedule"
        flags = {
            **SETTINGS,
            "csv_dir": folder / "csv",
            "data_dir": folder / "digits",
            "method": "ours" if ladder else method,
        }
        if ladder:
            flags["bit_schedule"] = "8,4"
            del flags["bitW"]
        self.command = [sys.executable, str(TOP / "resnet-20-cifar-10" / "main.py"), "--resume", "True"]
        self.command += [word for name, value in flags.items() for word in (f"--{name}", str(value))] + list(more)
        self.kills: Counter[str] = Counter()
        self.slowest = self.seconds = 0.0

    def prepare(self) -> None:
        """The images, the tasks, and the uninterrupted run."""
        make = TOP / "lifelong_data_generation"
        self.called(make / "prepare_images.py", "--dataset", "digits", "--out", self.folder / "digits")
        for source in ("train", "test"):
            self.called(
                make / "lifeLongDataGeneator.py", "--data_dir", self.folder / "digits", "--output_csv", "digits.csv",
                "--num_tasks", 3, "--diminish_rate", 100, "--source", source, "--output_dir", self.folder / "csv",
            )  # fmt: skip
        process = self.start("straight", "cache")
        began = self.begun(process)
        self.ended(process)
        self.seconds = time.monotonic() - began
        if process.returncode != 0:
            raise RuntimeError(f"the uninterrupted run ended with {process.returncode}: {self.said()}")

    def called(self, *words: object) -> None:
        subprocess.run(
            [sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def start(self, run: str, cache: str, fault: str = "") -> subprocess.Popen:
        words = [*self.command, "--job_dir", str(self.folder / run), "--cache_dir", str(self.folder / cache)]
        errors = (self.folder / "stderr").open("w+")
        with errors:
            return subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "LIFEQUANT_FAULT": fault},
            )

    def said(self) -> str:
        return (self.folder / "stderr").read_text()[-2000:]

    def begun(self, process: subprocess.Popen) -> float:
        """When a process starts to train: before, Python imports torch, which is most of such a short run's time."""
        for line in process.stdout:
            if line.startswith(("task ", "resumed ")):
                break
        return time.monotonic()

    def ended(self, process: subprocess.Popen) -> int:
        try:
            process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise RuntimeError(f"no end after {LIMIT} s") from None
        return process.returncode

    def torture(self, number: int, kills: int) -> list[str]:
        """One whole run, killed at least once; what differs in the end."""
        run, cache = f"run{number}", "cache"
        points = list(POINTS)[number % len(POINTS) :: kills]
        if "cache" in points:
            cache = f"cache{number}"  # one that has yet to be built
        plan = [*points, *self.random.choices([signal.SIGKILL, signal.SIGTERM], k=self.random.randint(0, 2))]
        while plan:
            what = plan.pop(0)
            code = self.killed_at(run, cache, what) if isinstance(what, str) else self.killed_by(run, cache, what)
            if code == 0:  # it ended before its moment came
                break
        else:
            code = self.ended(self.start(run, cache))
        if code != 0:
            return [f"exit code {code} of a run that nobody killed: {self.said()}"]
        from lifequant.experiments.same_runs import differences

        return differences(self.folder / run, self.folder / "straight")

    def killed_at(self, run: str, cache: str, point: str) -> int:
        """At a random one of the point's first passings; a run that has come far has but few ahead."""
        passing = self.random.randint(1, {"cache": 100, "checkpoint": 2, "rename": 2}.get(point, 1))
        code = self.ended(self.start(run, cache, f"{point}:{passing}"))
        if code == 0:
            raise RuntimeError(f"the run ended before passing {passing} of the point {point}")
        return self.counted(code, signal.SIGKILL, point)

    def killed_by(self, run: str, cache: str, number: signal.Signals) -> int:
        """At a random moment of the time that the whole run takes."""
        process = self.start(run, cache)
        self.begun(process)
        time.sleep(self.random.uniform(0, self.seconds))
        process.send_signal(number)
        began = time.monotonic()
        code = self.ended(process)
        if number == signal.SIGTERM:
            self.slowest = max(self.slowest, time.monotonic() - began)
        return 0 if code == 0 else self.counted(code, number, number.name)

    def counted(self, code: int, number: signal.Signals, name: str) -> int:
        if code not in ENDINGS[number]:
            raise RuntimeError(f"exit code {code} after {name}: {self.said()}")
        self.kills[name] += 1
        return code


def main(argv: Sequence[str]) -> int:
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = Parser(prog="torture.py", description="Kill runs, resume them, compare them with the uninterrupted one.")
    parser.add_argument("--kills", type=int_at_least(1), default=20, help="whole runs, each killed at least once")
    parser.add_argument(
        "--method", default="ours", help="a method, or bit_schedule; flags of main.py may follow after --"
    )
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="of the moments")
    args = parser.parse_args(words[:cut])
    try:
        import lifequant.experiments.same_runs  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error}: curves are compared by TensorBoard's reader: pip install 'lifequant[demo]'"
        ) from None
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Torture(Path(folder), args.method, args.seed, words[cut + 1 :])
        runs.prepare()
        print(f"{args.method}: the uninterrupted run took {runs.seconds:.1f} s from its first step on", flush=True)
        for number in range(args.kills):
            before = runs.kills.copy()
            found = runs.torture(number, args.kills)
            wrong += bool(found)
            kills = ", ".join((runs.kills - before).elements())
            print(f"run {number + 1} of {args.kills}: killed at {kills}; {len(found)} differences", flush=True)
            for line in found[:20]:
                print(f"  {line}")
    print(f"killed {sum(runs.kills.values())} times: {', '.join(f'{k} {n}' for k, n in sorted(runs.kills.items()))}")
    print(f"endings that are the uninterrupted run's, bit for bit: {args.kills - wrong} of {args.kills}")
    print(f"longest exit after SIGTERM: {runs.slowest:.1f} s" if runs.kills["SIGTERM"] else "no SIGTERM was drawn")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
