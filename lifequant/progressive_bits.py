"""--bit_schedule 32,8,4,2: progressive bits (LifeQuant, ICCV 2023), each rung a run of its own in job_dir/<bits>bit.

A rung starts from the model of the rung before. All but the last are trained on task 0 alone, so that nothing has seen a
later task before its time; the last one learns all tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lifequant import train
from lifequant.common.errors import UserError
from lifequant.config import RESUME_JOB_DIR, Config
from lifequant.results.table import CLASS_IL, SCENARIOS, TASK_IL, task_il


def rungs(config: Config) -> list[Config]:
    """The config of each rung. An --abitW of its own holds below 32 bits."""
    made: list[Config] = []
    for bits in config.bit_schedule:
        last = bits == config.bit_schedule[-1]
        changed: dict[str, Any] = {"bitW": bits, "job_dir": str(folder(config, bits)), "bit_schedule": None}
        changed["abitW"] = bits if config.abitW == config.bitW or bits == 32 else config.abitW
        if not last:
            changed["num_tasks"] = 1
        if made:
            source = Path(made[-1].job_dir) / "model_best.pt"
            changed |= {"source_dir": "", "source_file": str(source), "source_model": None, "pretrained": True}
        made.append(replace(config, **changed))
    return made


def folder(config: Config, bits: int) -> Path:
    return Path(config.job_dir) / f"{bits}bit"


def run(config: Config, notes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run all rungs, one after the other; with --resume those that are finished are only read. Raises UserError."""
    if config.resume and config.resume != RESUME_JOB_DIR:
        raise UserError("--bit_schedule is resumed by --resume without a path: job_dir has all of its rungs")
    found = []
    for index, rung in enumerate(rungs(config)):
        print(f"rung {index + 1} of {len(config.bit_schedule)}: {rung.bitW} bits, in {rung.job_dir}", flush=True)
        found.append(train.run(rung, notes if index == 0 else ()))
    print(table(config, found))
    return found


def table(config: Config, found: Sequence[dict[str, Any]]) -> str:
    """A line a rung: accuracy on task 0 when it had just been learned, and what all tasks came to at the last rung."""
    heads = ("task 0", CLASS_IL, TASK_IL, "forgetting", "model (kB)")
    lines = ["top-1 (%)", f"{'bits':<6}{'tasks':>6}" + "".join(f"{head:>12}" for head in heads)]
    for bits, results in zip(config.bit_schedule, found, strict=True):
        settings, forgot = results["config"], results["forgetting"]
        cells = (
            f"{results['top1'][0][0]:.2f}",
            f"{results['average_accuracy']:.2f}",
            f"{task_il(results):.2f}",
            "-" if forgot is None else f"{forgot:.2f}",
            f"{results['memory_bytes']['packed_model'] / 1000:.1f}",
        )
        begin = f"{settings['bitW']}/{settings['abitW']}"
        lines.append(
            f"{begin:<6}{len(results['tasks']):>6}" + "".join(f"{cell:>12}" for cell in cells) + f"  {bits}bit"
        )
    return "\n".join([*lines, *SCENARIOS])
