"""Real runs (train.Run, initialize.prepare, train.train_task) on random images in memory, for the scripts that time them.

A step is all that a user's step is: sampling, augmentation, forward, loss, penalty, backward, SGD and the running sums.
Only the curves and the text log are left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # finds a clone that was not installed

import torch

from lifequant import options, train
from lifequant.checkpointing import checkpoint, run_folder
from lifequant.data.dataset import DataSet, Store
from lifequant.data.task import Task
from lifequant.training import initialize, schedule

CLASSES = 10
FIRST_STEPS = 2  # steps of the first task: what gathers its importances step by step has gathered some


class NoLog:
    """Stands for Log and its writers: whatever a run says goes nowhere."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.curves = self

    def __getattr__(self, name: str) -> Callable[..., NoLog]:
        return lambda *args, **kwargs: self


def random_data(images: Sequence[int], classes: int, tests: int, device: torch.device) -> DataSet:
    """A task for each entry of ``images``, of so many images and of classes of its own; ``tests`` test images each."""
    noise = torch.Generator().manual_seed(0)

    def labels(task: int, count: int) -> torch.Tensor:
        first, last = (classes * index // len(images) for index in (task, task + 1))
        return first + torch.arange(count) % (last - first)

    def store(counts: Sequence[int]) -> tuple[Store, list[list[int]]]:
        pixels = torch.randint(0, 256, (sum(counts), 3, 32, 32), dtype=torch.uint8, generator=noise)
        every = torch.cat([labels(task, count) for task, count in enumerate(counts)])
        names = [f"{index:06d}" for index in range(len(every))]
        rows = [list(part) for part in torch.arange(len(every)).split(list(counts))]
        return Store(names, every.to(device), pixels.to(device)), [[int(row) for row in part] for part in rows]

    training, new = store(images)
    test, test_rows = store([tests] * len(images))
    return DataSet(
        prefix="random",
        class_names=[str(label) for label in range(classes)],
        ids=list(range(len(images))),
        train=training,
        test=test,
        new_rows=new,
        held_out=[[] for _ in images],
        replay_csv=None,
        test_rows=test_rows,
    )


def new_run(settings: dict[str, Any], dataset: DataSet, batch: int, stored: int, folder: str) -> train.Run:
    """A prepared run of one epoch a task that keeps ``stored`` images for replay."""
    config = options.make(
        buffer_size=stored,
        num_epochs=1,
        lr=0.01,  # random labels must not make a long benchmark diverge
        sched="constant",  # a turn is an epoch's end, where a cosine would leave the weights where they are
        train_batch_size=batch,
        print_freq=10**9,
        checkpoint_seconds=10**9,
        job_dir=folder,
        **settings,
    )
    run = train.Run(config, NoLog(), dataset.train.images.device, dataset)
    initialize.prepare(run)
    return run


def begin_task(run: train.Run, task_index: int) -> Task:
    """Begin a task as train.train_all does."""
    run.task_index, run.step = task_index, 0
    task = run.data.task(task_index, run.config, run.method.joint)
    train.begin_task(run, task)
    run.load_teacher(task)
    return task


def save_teacher(run: train.Run, task_index: int) -> None:
    """Write the checkpoint of a task's end, where the next task takes its teacher from."""
    if run.teacher is not None:
        checkpoint.write(run_folder.task_file(run.config.job_dir, task_index), run.state())


def to_last_task(run: train.Run) -> Task:
    """Train the first task for a few steps, then begin the last one, with its replay and importances; no other is run."""
    task = begin_task(run, 0)
    if run.num_tasks == 1:
        return task
    train_steps(run, task, FIRST_STEPS)
    train.end_task(run, task)
    for task_index in {0, run.num_tasks - 2}:  # the tasks between are not run: the last of these files stands for them
        save_teacher(run, task_index)
    return begin_task(run, run.num_tasks - 1)


def train_steps(run: train.Run, task: Task, steps: int) -> float:
    """Seconds of the epoch's last ``steps`` steps."""
    whole = schedule.steps_per_epoch(run.config, *run.task_sizes[run.task_index])
    run.step = max(whole - steps, 0)
    device = task.images.device
    synchronize(device)
    begin = time.perf_counter()
    train.train_task(run, task)
    synchronize(device)
    return time.perf_counter() - begin


def has_penalty(run: train.Run) -> bool:
    return run.config.penalty != "none" or run.method.has_penalty


def refuse_no_penalty(run: train.Run) -> None:
    """After some steps: a penalty that is 0 would not be timed. Raises RuntimeError."""
    with torch.no_grad():
        if has_penalty(run) and not run.penalty.penalty(run.model) > 0:
            raise RuntimeError("the penalty is 0: it would not be timed")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
