"""A GPU whose memory is full: one line that says what was being done and what to lower; the last checkpoint stands."""

from __future__ import annotations

import pytest
import torch
from support.tiny import arguments, settings

from lifequant import train as loop
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.methods.ewc import EWC
from lifequant.results import results


def full(monkeypatch: pytest.MonkeyPatch, where: object, name: str, call: int) -> None:
    """The ``call``-th call finds no memory."""
    original, calls = getattr(where, name), []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, function)


@pytest.mark.parametrize(
    ("where", "name", "call", "said"),
    [
        (loop, "training_step", 6, ["a training step, task 1, step 1", "--train_batch_size"]),
        (results, "evaluate", 2, ["an evaluation, task 1, step 8", "--eval_batch_size"]),
        (EWC, "estimate", 1, ["what the method does between tasks, task 0, step 4", "--train_batch_size"]),
        (loop, "load_dataset", 1, ["loading the images, before the first task", "--cache mmap"]),
        (torch, "load", 1, ["task 1, step 0"]),
    ],
)
def test_full(where, name, call, said, tiny, tmp_path, monkeypatch, capsys):
    """The teacher of task 1 is what torch.load reads; its file is not called a damaged one."""
    job, method = tmp_path / "run", {EWC: "ewc", torch: "lwf"}.get(where, "replay")
    with monkeypatch.context() as patch:
        full(patch, where, name, call)
        assert run_main(command, arguments(settings(tiny, job, method=method, replay_rate=0.25))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(text in error for text in said) and "the GPU's memory is full" in error
    assert not (job / "results.json").exists()
    if "task 1" in error:
        state, _ = checkpoint.read_last(job / "checkpoint" / checkpoint.LAST, lambda _: None)
        assert state["task_index"] == 1 and state["step"] == 0
