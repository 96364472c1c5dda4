"""The rows of scripts/benchmark.py, and the process that one of them runs in.

``python contenders.py '{"row": ..., "batch": ..., ...}'`` builds that contender, compiles it, warms it up, and writes
{"ready": seconds} on stdout, or {"skipped": why}. From then on it answers each line ``go N`` on stdin by {"seconds": of N
steps}; in between it waits and takes no processor's time. It ends when stdin does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]  # this folder, and a clone not installed

from lifequant import registry
from lifequant.common.errors import UserError, closest

WARM_UP_STEPS = 3
QUICK = ("float_compiled", "ours_compiled", "published_scheme")
PEERS = ("brevitas", "torch_qat")
PUBLISHED = "published_scheme"
BF16 = "_bf16"


def default_rows() -> list[str]:
    """Float, every quantizer, every method (``original`` is the quantizers' rows), the peers."""
    methods = [name for name in registry.names("method") if name not in ("original", "ours")]
    compiled = [f"{name}_compiled" for name in (*registry.names("quantizer"), "ours", *methods)]
    return ["float_eager", "float_compiled", *compiled, "ours_eager", *PEERS, PUBLISHED]


def known_rows() -> list[str]:
    """All rows: those by default, and what they leave out."""
    rows = default_rows()
    more = [row.removesuffix("_compiled") + "_eager" for row in rows if row.endswith("_compiled")]
    known = dict.fromkeys([*rows, *more])
    half = [row + BF16 for row in known if row not in (*PEERS, PUBLISHED)]
    return [*known, *half, *(f"{peer}_compiled" for peer in PEERS)]


def choose(patterns: Sequence[str], known: Sequence[str] | None = None) -> list[str]:
    """The rows that a shell pattern fits, each once, in the patterns' order. Raises UserError where one fits none."""
    known, chosen = known or known_rows(), []
    for pattern in patterns:
        fitting = [row for row in known if fnmatchcase(row, pattern)]
        if not fitting:
            raise UserError(f"--rows: no row fits {pattern!r}{closest(pattern, known)} (known: {', '.join(known)})")
        chosen += fitting
    return list(dict.fromkeys(chosen))


def settings_of(row: str) -> dict[str, Any]:
    """The settings of a run. A peer's is the float run, whose network is then exchanged."""
    if row.endswith(BF16):
        return settings_of(row.removesuffix(BF16)) | {"amp": "bf16"}
    name = row.rsplit("_", 1)[0]
    if name == "float" or row.startswith(PEERS):
        return {"method": "original", "bitW": 32}
    if name in registry.names("quantizer"):
        return {"method": "original", "quantizer": name, "bitW": 4}
    return {"method": name, "bitW": 4}


class Skipped(Exception):
    """A contender that can't be had here; the message says what to do."""


def build(args: dict[str, Any], folder: str) -> Callable[[int], float]:
    """A function that trains for so many steps and returns the seconds they took. Raises Skipped."""
    import torch

    from lifequant import options, train
    from lifequant.runtime.device import pick_device, wants_compile
    from lifequant.training.compiling import compile_step

    row, batch = args["row"], args["batch"]
    device = pick_device(options.make(device=args["device"]))
    if row == PUBLISHED:
        from benchmarking.published import Published

        published = Published(args["model"], batch, device)
        published.seconds(WARM_UP_STEPS)
        return published.seconds

    from benchmarking import peers
    from benchmarking import random_runs as runs

    if reason := peers.missing(row):
        raise Skipped(reason)
    compiled = row.removesuffix(BF16).endswith("_compiled")
    if compiled and not wants_compile(options.make(), device, 10**9, lambda text: None):
        raise Skipped("no C++ compiler here")
    stored = batch // 2
    steps = max(args["steps"], WARM_UP_STEPS)
    dataset = runs.random_data([2 * batch, batch * steps - stored], runs.CLASSES, runs.CLASSES, device)
    settings = {**settings_of(row), "target_model": args["model"], "device": args["device"]}
    run = runs.new_run(settings, dataset, batch, stored, folder)
    if row.startswith(PEERS):
        model = registry.model(args["model"])(runs.CLASSES, peers.scheme(row))
        run.set_model(model.to(device, memory_format=torch.channels_last))
    task = runs.to_last_task(run)
    if compiled:
        compile_step(run, train.losses)
    runs.train_steps(run, task, WARM_UP_STEPS)
    runs.refuse_no_penalty(run)
    return lambda steps: runs.train_steps(run, task, steps)


def serve(args: dict[str, Any]) -> None:
    """Answer on stdout; what libraries print there goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            seconds = build(args, folder)
        except Skipped as reason:
            return answer(skipped=str(reason))
        answer(ready=time.perf_counter() - begin)
        for line in sys.stdin:
            answer(seconds=seconds(int(line.split()[1])))


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
