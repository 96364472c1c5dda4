"""Which device a run uses, and whether its step is compiled."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lifequant.config import Config
from lifequant.errors import UserError

COMPILE_FROM_STEPS = 400  # a compilation takes about a minute on two cores and saves some 0.15 s a step


def pick_device(config: Config) -> torch.device:
    """``auto``: the GPU of that index where there is one. Only ``cuda`` demands one; raises UserError."""
    available = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise UserError(
            "--device cuda: torch finds no CUDA GPU here: use --device auto or cpu, or install a CUDA build of torch"
        )
    if config.gpus >= torch.cuda.device_count():
        raise UserError(f"--gpus {config.gpus}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device("cuda", config.gpus)


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """With ``wanted``, only algorithms that give the same bits again run inside; torch raises for what has none."""
    if not wanted:
        yield
        return
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it as it starts
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def wants_compile(config: Config, device: torch.device, steps: int, say: Callable[[str], None]) -> bool:
    """--compile; ``auto`` is a fixed rule of the run's steps, so a resumed run gets the same answer."""
    if device.type == "cpu":  # torch complains of a CUDA compiler without a CUDA GPU, which is no fault
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if config.compile != "auto":
        return config.compile == "on"
    if steps < COMPILE_FROM_STEPS:
        return False
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        say("--compile auto: no C++ compiler here, the step runs uncompiled")
        return False
    say(f"--compile auto: on ({steps} steps)")
    return True
