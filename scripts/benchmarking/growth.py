"""How the cost of ``ours`` grows with batch, width, tasks, classes and replay size, each varied alone, uncompiled.

Every point is a process of its own, one after another, so that its peak memory is its own: the largest resident size
less that before anything was built (on a GPU: what torch allocated at most). A slope is that of the least squares line
through log cost over log size: 1 is linear, 0 is no growth. For width the size is the number of weights, which grows
with its square, as a convolution's operations do.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]  # this folder, and a clone not installed

from tqdm import tqdm

from lifequant.common.errors import UserError

BASE = {"batch": 64, "width": 1, "tasks": 2, "classes": 100, "replay": 256}  # classes: two a task at 50 tasks
SIZES = {
    "batch": (32, 64, 128, 256),
    "width": (1, 2, 3),
    "tasks": (2, 10, 50),
    "classes": (10, 100, 1000),
    "replay": (256, 2048, 20000),
}
GONE = 256  # images of the first task that are not stored: without them there is nothing to hold
IMAGES = 256  # of every later task
TESTS = 32  # test images a task
STEPS, TURNS = 2, 5
LINEAR = 1.1  # a slope above it is worse than linear
COSTS = {
    "step": "step (ms)",
    "memory": "peak memory (MB)",
    "importance": "task's end: importances, next task (s)",
    "evaluation": "task's end: evaluation (s)",
}


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Of the least squares line through (log size, log cost)."""
    x, y = [math.log(v) for v in sizes], [math.log(max(v, 1e-9)) for v in costs]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    across = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / across


def least_slope(sizes: Sequence[float], spreads: Sequence[Sequence[float]]) -> float:
    """The slope where the smaller sizes cost what they cost at most, and the larger ones at least."""
    half = len(sizes) / 2
    return slope(sizes, [max(costs) if index < half else min(costs) for index, costs in enumerate(spreads)])


def resident() -> float:
    """The process's largest resident size until now, in MB; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def point(args: dict[str, Any]) -> dict[str, Any]:
    """{cost: its values} of one point."""
    import torch

    from benchmarking import random_runs as runs
    from lifequant import options, registry
    from lifequant.evaluation.evaluate import evaluate
    from lifequant.models.resnet import ResNet
    from lifequant.runtime.device import pick_device

    name = args["model"]
    if args["width"] > 1:
        name = f"resnet20x{args['width']}"

        @registry.register("model", name)
        def wide(num_classes: int, scheme: Any, shortcut: str = "A") -> ResNet:
            return ResNet(20, num_classes, scheme, shortcut, args["width"])

    device = pick_device(options.make(device=args["device"]))
    before = resident()
    last = args["batch"] * STEPS + IMAGES
    images = [args["replay"] + GONE, *[IMAGES] * (args["tasks"] - 2), last]
    dataset = runs.random_data(images, args["classes"], TESTS, device)
    settings = {"method": "ours", "bitW": 4, "target_model": name, "device": args["device"]}
    with tempfile.TemporaryDirectory() as folder:
        run = runs.new_run(settings, dataset, args["batch"], args["replay"], folder)
        task = runs.begin_task(run, 0)
        runs.train_steps(run, task, 2)
        begin = time.perf_counter()
        runs.end_task(run, task)
        task = runs.begin_task(run, run.num_tasks - 1)
        runs.synchronize(device)
        importance = time.perf_counter() - begin
        runs.train_steps(run, task, 1)
        runs.refuse_no_penalty(run)
        steps = [1000 * runs.train_steps(run, task, STEPS) / STEPS for _ in range(TURNS)]
        begin = time.perf_counter()
        evaluate(run.model, dataset, run.config.eval_batch_size)
        runs.synchronize(device)
        evaluation = time.perf_counter() - begin
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else resident() - before
    weights = sum(p.numel() for p in run.model.parameters())
    return {
        "step": steps,
        "memory": [memory],
        "importance": [importance],
        "evaluation": [evaluation],
        "weights": weights,
    }


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """``point`` in a process of its own."""
    words = [sys.executable, "-W", "ignore", __file__, json.dumps(settings)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode:
        raise UserError(f"--growth failed at {settings}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(kind: str, values: Sequence[int], points: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Markdown lines, and {cost: {"median": [...], "slope": ..., "worse_than_linear": ...}}."""
    sizes = [p["weights"] for p in points] if kind == "width" else values
    heads = [
        f"{value} ({size:,} weights)" if kind == "width" else f"{value:,}"
        for value, size in zip(values, sizes, strict=True)
    ]
    lines = [f"| {kind} | {' | '.join(heads)} | slope | |", "|---|" + "---:|" * (len(values) + 1) + "---|"]
    found: dict[str, Any] = {"sizes": list(sizes)}
    for cost, title in COSTS.items():
        spreads = [p[cost] for p in points]
        medians = [statistics.median(spread) for spread in spreads]
        slopes = slope(sizes, medians), least_slope(sizes, spreads)
        worse = min(slopes) > LINEAR
        digits = 0 if cost in ("step", "memory") else 2
        cells = " | ".join(f"{median:,.{digits}f}" for median in medians)
        lines.append(f"| {title} | {cells} | {slopes[0]:.2f} | {'WORSE THAN LINEAR' if worse else ''} |")
        found[cost] = {"median": medians, "slope": slopes[0], "worse_than_linear": worse}
    return [*lines, ""], found


def growth(model: str, device: str) -> tuple[str, dict[str, Any]]:
    """(Markdown, the figures) of all sweeps. A point that two sweeps share is measured once."""
    wanted = {kind: [{**BASE, kind: value} for value in values] for kind, values in SIZES.items()}
    every = list({json.dumps(one): one for points in wanted.values() for one in points}.values())
    done = {
        json.dumps(one): measure({**one, "model": model, "device": device})
        for one in tqdm(every, "points", disable=None)
    }
    lines, found = [], {}
    for kind, points in wanted.items():
        more, found[kind] = table(kind, SIZES[kind], [done[json.dumps(one)] for one in points])
        lines += more
    rest = ", ".join(f"{name} {value}" for name, value in BASE.items())
    about = f"ours at 4 bits, {model}, uncompiled; what is not varied is {rest}; {TESTS} test images a task."
    return "\n".join(["## Growth", "", about, "", *lines]), found


if __name__ == "__main__":
    print(json.dumps(point(json.loads(sys.argv[1]))))
