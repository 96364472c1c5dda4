"""Which device a run uses, and whether its step is compiled."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import cpu

from lifequant.common.errors import UserError
from lifequant.config import Config
from lifequant.runtime.distributed import local_rank

# A compilation takes about a minute. On two cores it then saves some 0.15 s a step; on a GPU, where a step is a hundred
# launches of small kernels, some 10 ms (an estimate, not measured).
COMPILE_FROM_STEPS = {"cpu": 400, "cuda": 4000}
WORK = {  # the timer's kind: (what is done then, what needs less memory)
    "startup": ("loading the images", "give --cache mmap"),
    "data": ("loading a batch", "give --cache mmap"),
    "step": ("a training step", "lower --train_batch_size"),
    "method": ("what the method does between tasks", "lower --train_batch_size"),
    "evaluation": ("an evaluation", "lower --eval_batch_size"),
}


def pick_device(config: Config) -> torch.device:
    """The device of ``--device``. ``auto`` takes the GPU of that index if there is one. Raises UserError if ``cuda`` has none."""
    available = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise UserError(
            "--device cuda: torch finds no CUDA GPU here: use --device auto or cpu, or install a CUDA build of torch"
        )
    index = config.gpus if local_rank() is None else local_rank()
    if index >= torch.cuda.device_count():
        raise UserError(f"GPU {index}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    torch.cuda.set_device(index)  # what names no index would else open a context on GPU 0
    torch.backends.cudnn.benchmark = not config.deterministic  # all steps have the same shapes
    _allow_tf32(False)
    return torch.device("cuda", index)


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


@contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """With ``wanted``, a GPU may compute convolutions and products in TF32 inside; ``pick_device`` forbids it elsewhere."""
    if not wanted:
        yield
        return
    _allow_tf32(True)
    try:
        yield
    finally:
        _allow_tf32(False)


def arithmetic(config: Config, device: torch.device) -> str:
    """What the convolutions of a training step compute in: bfloat16, tf32 or float32."""
    if config.amp == "bf16":
        return "bfloat16"
    return "tf32" if config.tf32 and device.type == "cuda" else "float32"


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether this is an x86 CPU without bfloat16 instructions, on which torch emulates them."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return not any(getattr(cpu, name, lambda: True)() for name in names)  # a torch that can't tell is believed


@contextmanager
def memory_explained(doing: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Inside, a GPU whose memory is full raises UserError. ``doing`` gives (the timer's kind of work, where in the run)."""
    try:
        yield
    except torch.OutOfMemoryError:
        kind, where = doing()
        what, remedy = WORK.get(kind, WORK["startup"])
        free = ""
        if torch.cuda.is_available():
            free = " ({:.1f} of {:.1f} GiB are free)".format(*(size / 2**30 for size in torch.cuda.mem_get_info()))
        raise UserError(
            f"the GPU's memory is full in {what}, {where}{free}: {remedy}, or end other programs on this GPU; the last "
            "checkpoint stands"
        ) from None


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """With ``wanted``, only deterministic algorithms run inside; torch raises an error for an operation that has none."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def wants_compile(
    config: Config, device: torch.device, steps: int, say: Callable[[str], None], kept: bool | None = None
) -> bool:
    """Whether the step is compiled: --compile, where ``auto`` is a fixed rule of the device and the run's ``steps``.

    ``kept``: what a resumed run had decided, which holds, since a compiled step and an eager one differ in the last digits.
    Says what it chose, and why. Raises UserError where the step is to be compiled and can't be.
    """
    if device.type == "cpu":  # torch complains of a CUDA compiler without a CUDA GPU, which is no fault
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    lacking, least = _lacking(device), COMPILE_FROM_STEPS[device.type]
    if kept is not None:
        chosen, why = kept, "as the run began, by its checkpoint"
    elif config.compile != "auto":
        chosen, why = config.compile == "on", "as asked for"
    elif lacking and steps >= least:
        chosen, why = False, f"{lacking} is not there"
    else:
        chosen = steps >= least
        why = f"a {'long' if chosen else 'short'} run: a compilation pays from about {least} steps on"
    if chosen and lacking:
        way = "or begin the run anew" if kept else "or leave the flag out"
        raise UserError(
            f"--compile {config.compile}: the step is compiled ({why}), and {lacking} is not there: install it, {way}"
        )
    if config.compile == "auto":
        say(f"--compile auto: {'on' if chosen else 'off'} ({why})")
    return chosen


def _lacking(device: torch.device) -> str:
    """What torch.compile needs on this device and does not find; empty if nothing is missing."""
    if device.type == "cuda":  # Triton compiles its launchers with a C compiler
        compilers = (os.environ.get("CC") or "cc", "cc", "gcc", "clang")
        lacking = "" if importlib.util.find_spec("triton") else "triton"
        return lacking or ("" if any(map(shutil.which, compilers)) else "a C compiler")
    compilers = (os.environ.get("CXX") or "g++", "g++", "clang++", "c++", "cl")
    return "" if any(map(shutil.which, compilers)) else "a C++ compiler"
