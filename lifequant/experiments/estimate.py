"""How long runs take: seconds before the first step, and seconds an image, by what runs like them took."""

from __future__ import annotations

import heapq
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lifequant.config import REPLAY_RATE, Config
from lifequant.data.create.class_folders import Seen, class_images, class_names
from lifequant.data.create.tasks import domain_images
from lifequant.experiments.grid import Run, checked
from lifequant.experiments.grid_tasks import classes_of_tasks
from lifequant.models.build import operations
from lifequant.options import make

GUESS = 200.0  # images of 32 pixels a second and core, of a ResNet-20: what a time is reckoned from before a run has finished
START = 8.0  # seconds of a run without its steps, before one has finished
QUANTIZED = 1.5  # about what an image costs in a quantized network, in units of a float network's (docs/benchmark.md)
LEFT = re.compile(r" (?:(\d+) h )?(\d+) (s|min) left$", re.MULTILINE)  # the end of an epoch's line


def images_of_classes(data_dir: Path, domains: Sequence[str] | None) -> list[list[int]]:
    """Training images of each class, in each domain or in the one folder."""
    if domains:
        names, pools = domain_images(data_dir, domains, "train", 0, Seen())
    else:
        names = class_names(data_dir / "train")
        pools = [class_images(data_dir, data_dir / "train", names)]
    counts = [Counter(label for _, label in rows) for rows in pools]
    return [[of_class[label] for label in range(len(names))] for of_class in counts]


def cost(config: Config) -> float:
    """What an image costs, in units of one of 32 pixels in a ResNet-20."""
    return _operations(config.target_model, config.image_size, config.stem) / _operations("resnet20", 32, "auto")


@cache
def _operations(target_model: str, image_size: int, stem: str) -> int:
    return operations(make(target_model=target_model, image_size=image_size, stem=stem))


def work(run: Run, counts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(of the whole run, of what it trains itself): images of 32 pixels that a float ResNet-20 would train on in that time."""
    config, tasks = checked(run, run.name), run.tasks
    most = tasks.get("images_per_class") or max(map(max, counts))
    each = [[min(most, n) * (1 - tasks.get("held_out", 0.0)) for n in of_class] for of_class in counts]
    if tasks.get("domains"):
        new = list(map(sum, each))
    else:
        split = classes_of_tasks(tasks, len(each[0]), run.task_seed)
        new = [sum(each[0][label] for label in labels) for labels in split]
    rate = 0.0 if config.replay_rate == 0 or config.buffer_size else config.replay_rate or REPLAY_RATE
    images = [n + rate * sum(new[:t]) + min(config.buffer_size or 0, sum(new[:t])) for t, n in enumerate(new)]
    if config.replay_batch:
        images = [max(images[t], n / (1 - config.replay_batch * (t > 0))) for t, n in enumerate(new)]
    scale = config.num_epochs * cost(config) * (QUANTIZED if config.bitW < 32 else 1.0)
    images = images[: config.num_tasks]
    return scale * sum(images), scale * sum(images[config.start_task :])


@dataclass(frozen=True)
class Taken:
    """What a finished run took: seconds without its steps, seconds of its steps, and its ``work``."""

    run: Run
    fixed: float
    steps: float
    work: float
    here: bool  # on this machine


class Estimate:
    """What runs will take, by those that have finished."""

    def __init__(self, runs: Sequence[Run], data_dir: Path, cores: float) -> None:
        counts = images_of_classes(data_dir, runs[0].tasks.get("domains"))
        self.work = {run.folder: work(run, counts) for run in runs}
        self.guess, self.taken = GUESS * cores, []

    def learn(self, run: Run, results: dict[str, Any], wall: float | None, here: bool) -> None:
        """Take in a finished run. ``wall``: seconds of its process, if known; one that was resumed took less than all its steps."""
        whole, own = self.work[run.folder]
        startup, compilation = (results["time_share"][f"{part}_seconds"] for part in ("startup", "compile"))
        steps = max(0.0, results["seconds"] - compilation) * own / whole  # a fork has task 0's seconds of the other run
        fixed = startup + compilation if wall is None or wall < steps else wall - steps
        self.taken.append(Taken(run, fixed, steps, own, here))

    def like(self, run: Run) -> tuple[list[Taken], bool]:
        """(finished runs of its row, else of its method and bits, else all; whether they are more than just all)."""
        here = [taken for taken in self.taken if taken.here] or self.taken
        for alike in (lambda r: r.name.rsplit("/", 1)[0], lambda r: (r.flags.get("method"), r.flags.get("bitW"))):
            if found := [taken for taken in here if alike(taken.run) == alike(run)]:
                return found, True
        return here, False

    def seconds(self, run: Run) -> tuple[float, float]:
        """(without its steps, of its steps) that a run takes."""
        found, own = self.like(run)[0], self.work[run.folder][1]
        if not found:
            return START, own / self.guess
        pace = sum(taken.steps for taken in found) / sum(taken.work for taken in found)
        return statistics.median(taken.fixed for taken in found), pace * own

    def left(self, waiting: Sequence[Run], going: Sequence[tuple[Run, float, float | None]], slots: int) -> float:
        """Seconds until all runs have ended, ``slots`` at a time.

        ``going`` has those under way, with their seconds so far, and those that they say are left.
        """
        # While none like it has finished, a run's steps are taken to be as slow as those of the runs under way.
        late, said = [], []
        for run, done, left in going:
            fixed, steps = self.seconds(run)
            if not self.like(run)[1]:
                late.append((done - fixed) / steps)
                said += [(done + left - fixed) / steps] if left is not None else []
        factor = statistics.median(said) if said else max([1.0, *late])
        whole = {}
        for run in [*waiting, *(run for run, _, _ in going)]:
            fixed, steps = self.seconds(run)
            whole[run.folder] = fixed + steps * (1.0 if self.like(run)[1] else factor)
        whole |= {run.folder: done + left for run, done, left in going if left is not None and not self.like(run)[1]}
        ends = {run.folder: max(whole[run.folder] - done, 0.0) for run, done, _ in going}
        free, waiting = [*ends.values(), *[0.0] * (slots - len(ends))], list(waiting)
        heapq.heapify(free)
        unknown = {run.folder: float("inf") for run in waiting}
        while waiting:
            now = heapq.heappop(free)
            ready = (run for run in waiting if all({**unknown, **ends}.get(f, 0.0) <= now for f in run.after))
            if run := next(ready, None):
                waiting.remove(run)
                ends[run.folder] = now + whole[run.folder]
                heapq.heappush(free, ends[run.folder])
            else:  # all that is left begins from a run that is still under way
                heapq.heappush(free, min(end for end in ends.values() if end > now))
        return max(ends.values(), default=0.0)


def said_left(log: Path, now: float) -> float | None:
    """Seconds that a run says are left, by the last epoch's line in its log; None before one. ``now``: time.time()."""
    try:
        found = LEFT.findall(log.read_text(encoding="utf-8", errors="replace"))
        age = now - log.stat().st_mtime
    except FileNotFoundError:
        return None
    if not found:
        return None
    hours, number, unit = found[-1]
    return max(0.0, 3600 * int(hours or 0) + int(number) * {"s": 1, "min": 60}[unit] - age)


def spent(results: dict[str, Any]) -> float:
    """Seconds that a run took, with its start."""
    return results["seconds"] + results["time_share"]["startup_seconds"]
