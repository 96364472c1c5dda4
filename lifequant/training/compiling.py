"""What torch.compile takes of the training step; on a GPU as CUDA graphs, which need one launch each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lifequant.methods.stored_logits import StoredLogits
from lifequant.runtime import distributed
from lifequant.training.run import Run


def compile_step(run: Run, losses: Callable) -> None:
    """Compile ``losses(run, batch)`` with its backward pass, and the teacher; on a GPU also what method and penalty do
    at each step (``compilable``). On a CPU that takes as long compiled as not."""
    run.log.say("compiling the training step: 1 to 3 minutes the first time, and silence until then")
    torch.compiler.reset()  # else former runs of this process count against the limit of recompilations
    run.compiled = True
    alone = distributed.world_size() == 1  # SyncBatchNorm's messages can't be part of a CUDA graph
    mode = "reduce-overhead" if run.device.type == "cuda" and alone else None
    compiled = partial(torch.compile, dynamic=False, mode=mode)
    run.compiled_losses = compiled(partial(losses, run))
    run.teach = run.teacher and compiled(run.teacher)
    if run.device.type == "cuda":
        for part in (*run.callbacks, run.oscillations):
            for name in part.compilable if part else ():
                setattr(part, name, compiled(getattr(part, name)))


def keep_in_place(run: Run) -> None:
    """Say that what the method, the penalty and the watch of oscillations hold stays where it is during a task: a CUDA graph
    reads it there, instead of a copy that is made at each step."""
    counts = run.oscillations.state if run.oscillations else {}
    for value in _tensors([*map(vars, run.callbacks), counts, run.old_classes, run.old_class_share]):
        torch._dynamo.mark_static_address(value, guard=False)


def _tensors(held: Any) -> Iterator[Tensor]:
    """Tensors in lists, dicts and what a method is made of."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for value in held.values() if isinstance(held, dict) else held:
            yield from _tensors(value)
    elif isinstance(held, StoredLogits):
        yield from _tensors(vars(held))
