"""Images/s of the training step: float, lsq at 4 bits, and the whole of ours at 4 bits, each eager and compiled.

Every contender is a real run (train.Run, start.prepare, train.train_task) on random images in memory, so a step is all
that a user's step is: sampling, augmentation, forward, loss, penalty, backward, SGD and the running sums. Only the
curves are left out. ``ours`` is timed in its second task, with replay and the importances that belong to it.

All contenders live in one process and take turns, a round at a time, each round in another order: whatever slows the
machine down slows all of them. Ratios are taken within a round. The first steps (a compilation) are not timed.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("lifequant") is None:  # a bare clone that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from lifequant import data, options, results, start, train
from lifequant.cli import Parser, run_main, whole
from lifequant.device import pick_device, wants_compile

CLASSES = 10
WARM_UP_STEPS = 3
STEPS = {
    "float": {"method": "original", "bitW": 32},
    "lsq": {"method": "original", "bitW": 4},
    "ours": {"method": "ours", "bitW": 4},
}
RATIOS = [
    *[(f"{name} compiled", f"{name} eager") for name in STEPS],
    *[(f"{name} {kind}", f"float {kind}") for kind in ("eager", "compiled") for name in ("lsq", "ours")],
]


class NoLog:
    """Stands for log.Log: what a run says goes nowhere."""

    warnings: Sequence[str] = ()

    def say(self, text: str) -> None:
        pass

    warn = note = say

    def writer(self, *args: Any, **kwargs: Any) -> NoLog:
        return self

    def add_scalar(self, *args: Any) -> None:
        pass


def random_data(batch: int, steps: int, device: torch.device) -> tuple[data.DataSet, int]:
    """(two tasks of other classes, images to store): a pool of ``steps`` batches in the second, stored or not."""
    noise = torch.Generator().manual_seed(0)
    stored = batch // 2
    sizes = (2 * batch, batch * steps - stored)

    def store(count: int) -> data.Store:
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=noise)
        labels = torch.arange(count) % CLASSES
        return data.Store([f"{i:06d}" for i in range(count)], labels.to(device), images.to(device))

    training, test = store(sum(sizes)), store(CLASSES)
    training.labels %= CLASSES // 2
    training.labels[sizes[0] :] += CLASSES // 2
    new = [list(range(sizes[0])), list(range(sizes[0], sum(sizes)))]
    tests = [list(range(CLASSES // 2)), list(range(CLASSES // 2, CLASSES))]
    names = [str(label) for label in range(CLASSES)]
    return data.DataSet("random", names, [0, 1], training, test, new, [[], []], None, tests), stored


def contender(
    settings: dict[str, Any], compiled: bool, args: Any, found: tuple[data.DataSet, int]
) -> Callable[[int], float]:
    """A function that trains for so many steps and returns the seconds they took."""
    dataset, stored = found
    config = options.make(
        **settings,
        buffer_size=stored,
        num_epochs=1,
        lr=0.01,  # random labels must not make a long benchmark diverge
        train_batch_size=args.batch,
        target_model=args.model,
        device=args.device,
        print_freq=10**9,
        checkpoint_seconds=10**9,
        job_dir=args.unused,
    )
    device = dataset.train.images.device
    run = train.Run(config, NoLog(), device, dataset)
    start.prepare(run)
    first, task = (dataset.task(place, config, run.method) for place in (0, 1))
    for hook in run.hooks:
        hook.begin_task(run.model, first)
        hook.end_task(run.model, first)
        hook.begin_task(run.model, task)
    importance = getattr(run.guard, "importance", {})
    if config.penalty != "none" and not all(value.any() for value in importance.values()):
        raise RuntimeError("the penalty has no importances: it would not be timed")
    if compiled:
        run.losses = torch.compile(run.compute_losses, dynamic=False)
    steps_there = -(-len(task.pool) // args.batch)

    def seconds(steps: int) -> float:
        run.step = steps_there - steps
        synchronise(device)
        begin = time.perf_counter()
        train.train_task(run, task)
        synchronise(device)
        return time.perf_counter() - begin

    return seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def header(args: Any, device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return "\n".join(
        [
            f"lifequant {results.metadata_version()} ({results.commit()}), torch {torch.__version__}, Python {platform.python_version()}",
            f"{platform.system()} {platform.machine()}, {processor()}, {os.cpu_count()} cores; {device}: {where}; load {load}",
            f"{args.model}, 32x32 images, batch {args.batch}, {args.rounds} rounds of {args.steps} steps a contender, interleaved in one process",
        ]
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the least and the largest value."""
    return f"{statistics.median(values):8.{digits}f}  {min(values):8.{digits}f} .. {max(values):.{digits}f}"


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="benchmark_step.py", description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=whole(8), default=128, help="images a step")
    parser.add_argument("--rounds", type=whole(1), default=7, help="times that each contender takes its turn")
    parser.add_argument("--steps", type=whole(1), default=15, help="steps of a turn")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to run")
    parser.add_argument("--model", default="resnet20", help="the network")
    parser.add_argument("--eager", action="store_true", help="leave the compiled steps out")
    args = parser.parse_args(argv)
    device = pick_device(options.make(device=args.device))
    print(header(args, device), flush=True)
    kinds = [False]
    if not args.eager and wants_compile(options.make(), device, 10**9, lambda text: None):
        kinds.append(True)
    elif not args.eager:
        print("no C++ compiler here: eager only")

    with tempfile.TemporaryDirectory() as args.unused:
        found = random_data(args.batch, max(args.steps, WARM_UP_STEPS), device)
        turns: dict[str, Callable[[int], float]] = {}
        for name, settings in STEPS.items():
            for compiled in kinds:
                turns[f"{name} {'compiled' if compiled else 'eager'}"] = contender(settings, compiled, args, found)
        for name, turn in turns.items():
            print(f"first {WARM_UP_STEPS} steps, {name}: {turn(WARM_UP_STEPS):.1f} s", flush=True)
        speeds: dict[str, list[float]] = {name: [] for name in turns}
        names = list(turns)
        for round in tqdm(range(args.rounds), "rounds", disable=None):
            for name in names[round % len(names) :] + names[: round % len(names)]:
                speeds[name].append(args.steps * args.batch / turns[name](args.steps))

    print(f"\n{'images/s':<32}  median     least .. largest")
    for name, values in speeds.items():
        print(f"{name:<30}{spread(values, 1)}")
    print(f"\n{'ratio, within rounds':<32}  median     least .. largest")
    for above, below in RATIOS:
        if above in speeds and below in speeds:
            ratios = [a / b for a, b in zip(speeds[above], speeds[below], strict=True)]
            print(f"{above + ' / ' + below:<30}{spread(ratios, 3)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
