"""Many runs, a few at a time, each in a process of its own with its share of the cores. Finished ones are not run again."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("lifequant") is None:  # a bare clone that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def one(settings: dict[str, Any]) -> str | None:
    """Run it quietly (its folder has logger.log); the message where it failed."""
    from lifequant.errors import UserError
    from lifequant.options import make
    from lifequant.train import run

    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            run(make(**settings))
        except UserError as error:
            return str(error)
    return None


def run_all(runs: list[dict[str, Any]], jobs: int) -> dict[str, dict[str, Any] | None]:
    """{job_dir: results.json's content}, None for a run that failed (its last line is printed)."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    os.environ["OMP_NUM_THREADS"] = threads  # read by the processes when they import torch
    results: dict[str, dict[str, Any] | None] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        messages = pool.map(one, [{**settings, "resume": "True"} for settings in runs])
        for place, (settings, message) in enumerate(zip(runs, messages, strict=True), start=1):
            folder = str(settings["job_dir"])
            print(f"{place}/{len(runs)} {folder}: {message or 'done'}", flush=True)
            file = Path(folder) / "results.json"
            results[folder] = None if message else json.loads(file.read_text(encoding="utf-8"))
    return results
