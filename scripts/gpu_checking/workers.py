"""Parts of scripts/gpu_check.py that touch the GPU, each a process of its own that prints JSON in its last line.

python workers.py machine DEVICE         what the machine has
python workers.py differences RUN OTHER  where two runs differ: tensors, results.json but for times, curves
python workers.py memory BATCH           bytes that a training step of ours takes on the GPU at most, in its second task
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]  # scripts/, and a clone that was not installed

STEPS = 4


def machine(device: str) -> dict[str, Any]:
    """Names, versions, the compiler that torch.compile needs there. ``found`` is a matrix product's, done on the device."""
    import torch

    compilers = ("CC", "cc", "gcc", "clang") if device == "cuda" else ("CXX", "g++", "clang++", "c++")
    names = [os.environ.get(compilers[0], ""), *compilers[1:]]
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "compiler": next((path for name in names if name and (path := shutil.which(name))), None),
        "triton": version("triton"),
        "python": platform.python_version(),
    }
    ones = torch.ones(64, 64, device=device)
    found["works"] = bool(((ones @ ones) == 64).all())
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "gpus": torch.cuda.device_count(),
            "free": free,
            "total": total,
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(),
        }
    return found


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


def differences(run: str, other: str) -> list[str]:
    from lifequant.experiments import same_runs

    return same_runs.differences(Path(run), Path(other))


def memory(batch: str) -> dict[str, int]:
    """{"before": allocated before the step, "eager": the most within steps, "compiled": the same} in bytes."""
    import torch
    from benchmarking import random_runs as runs

    from lifequant import train
    from lifequant.training.compiling import compile_step

    size, device = int(batch), torch.device("cuda", 0)
    found: dict[str, int] = {}
    dataset = runs.random_data([2 * size, size * STEPS - size // 2], runs.CLASSES, runs.CLASSES, device)
    with tempfile.TemporaryDirectory() as folder:
        run = runs.new_run({"method": "ours", "bitW": 4, "device": "cuda"}, dataset, size, size // 2, folder)
        task = runs.to_last_task(run)
        for kind in ("eager", "compiled"):
            if kind == "compiled":
                compile_step(run, train.losses)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            found.setdefault("before", torch.cuda.memory_allocated())
            runs.train_steps(run, task, STEPS)
            found[kind] = torch.cuda.max_memory_allocated()
    return found


if __name__ == "__main__":
    asked = {"machine": machine, "differences": differences, "memory": memory}[sys.argv[1]]
    print(json.dumps(asked(*sys.argv[2:])))
