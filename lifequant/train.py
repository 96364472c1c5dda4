"""run(config): the task loop and THE training step.

All that is random comes from a generator seeded by (seed, purpose, task, epoch or step), so a run's state is a place in
it: the task and the number of steps done. A run that is killed and resumed draws what it would have drawn.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lifequant import registry
from lifequant.checkpointing import checkpoint, run_folder
from lifequant.common import fault_injection
from lifequant.common.seeding import generator
from lifequant.config import Config
from lifequant.data.augment import normalize
from lifequant.data.dataset import load_dataset
from lifequant.data.image_storage import send
from lifequant.data.replay import epoch_order
from lifequant.data.task import Batch, Task
from lifequant.evaluation.evaluate import validation_top1
from lifequant.qat.batchnorm import reestimate_bn
from lifequant.results import results
from lifequant.results.table import table
from lifequant.runtime import distributed, preemption
from lifequant.runtime.device import deterministic, pick_device, wants_compile
from lifequant.runtime.log import Log
from lifequant.training import history, initialize
from lifequant.training.ema import WeightAverage
from lifequant.training.head import train_head
from lifequant.training.nonfinite import skip_step
from lifequant.training.run import Run
from lifequant.training.schedule import lr_factor

ALONE = (
    "{}: without replay nothing compares old classes with new ones, so a head that all tasks share forgets nearly "
    "everything (van de Ven et al. 2022); the task-masked accuracy is where such methods differ"
)


def make_batch(task: Task, order: Tensor, index: int, size: int, noise: torch.Generator) -> Batch:
    """Batch ``index`` of an epoch, augmented on the device. The last one is filled up from the epoch's begin."""
    positions = order[torch.arange(index * size, (index + 1) * size, device=order.device) % len(order)]
    rows = task.pool_on_image_device[positions]
    images = task.augment(task.take(rows), noise)
    positions, rows = send(positions, images.device), send(rows, images.device)
    return Batch(normalize(images), task.labels[rows], positions >= len(task.new_rows), rows)


def training_step(run: Run, batch: Batch, factor: float) -> Tensor:
    """THE training step, at ``factor`` times the learning rate; returns history.step_sums. No device synchronization."""
    model, optimizer = run.model, run.optimizer
    optimizer.zero_grad()  # before the forward: a CUDA graph takes back the memory of the former step's gradients
    if run.compiled and run.device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    run.watch.before()
    logits, task_loss, penalty = run.losses(run.with_teacher(batch))
    penalty = run.config.ll_lambda * penalty
    (task_loss + penalty).backward()
    distributed.average_gradients(model)
    if not run.watch.fine([task_loss, penalty], factor * run.config.lr):
        return skip_step(run, batch, save)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["highest_lr"]
    for callback in run.callbacks:
        callback.after_backward(model)
    with torch.no_grad():
        with run.scales.limit_scale_updates():
            optimizer.step()
        for callback in run.callbacks:
            callback.after_step(model, factor)
        if run.oscillations:
            run.oscillations.after_step(model)
        if run.average:
            run.average.update(model)
        return distributed.total(history.step_sums(logits, batch.y, task_loss, penalty))


def compile_step(run: Run) -> None:
    """Forward, losses and penalty as one compiled graph; on a GPU as CUDA graphs, which take a launch each instead of
    hundreds."""
    torch.compiler.reset()  # else former runs of this process count against the limit of recompilations
    run.compiled = True
    alone = distributed.world_size() == 1  # SyncBatchNorm's messages are no part of a CUDA graph
    mode = "reduce-overhead" if run.device.type == "cuda" and alone else None
    run.losses = torch.compile(run.compute_losses, dynamic=False, mode=mode)
    run.teach = run.teacher and torch.compile(run.teacher, dynamic=False, mode=mode)


def train_task(run: Run, task: Task) -> None:
    """Train on one task, from ``run.step`` steps on."""
    config = run.config
    size = distributed.batch_size(min(config.train_batch_size, len(task.pool)))
    steps_per_epoch = -(-len(task.pool) // size)
    steps = config.num_epochs * steps_per_epoch
    first = run.step + 1 if run.step else 0  # what was written at the checkpoint's own step is kept
    curves = run.log.writer(f"task{run.data.ids[task.task_index]}", purge_step=first)
    order = None
    run.timer.begin_task()
    bar = tqdm(
        total=steps,
        initial=run.step,
        desc=task.name,
        unit=" steps",
        leave=False,
        disable=distributed.rank() > 0 or None,
    )
    run.model.train()
    run.watch.keep(run)
    while run.step < steps:
        run.timer.switch("data")
        epoch, index = divmod(run.step, steps_per_epoch)
        if index == 0 or order is None:
            order = epoch_order(
                task.labels[task.pool],
                task.counts,
                config.sampler,
                generator(config.seed, "order", task.task_index, epoch),
            ).to(task.pool_on_image_device.device)
        batch = make_batch(task, order, index, size, generator(config.seed, "augment", task.task_index, run.step))
        factor = lr_factor(config, run.step, steps_per_epoch)
        run.timer.switch("step")
        sums = training_step(run, distributed.share(batch), factor)
        run.sums += sums
        run.epoch_sums = sums if index == 0 else run.epoch_sums + sums
        run.step += 1
        run.timer.step(size)
        run.timer.switch("logging")
        bar.update()
        due = run.step % config.print_freq == 0 or run.step == steps
        if due and not results.read_window(run, curves, bar, config.lr * factor):
            order = None  # gone back to the last reading
            continue
        if run.step % steps_per_epoch == 0:
            end_epoch(run, task, epoch, curves)
        due = run.timer.since_checkpoint() > config.checkpoint_seconds and run.step < steps
        if due or preemption.requested():
            save(run)
        if preemption.requested():
            run.writer.wait()
            preemption.stop()
    bar.close()


def end_epoch(run: Run, task: Task, epoch: int, curves: Any) -> None:
    """A line in the log; with held-out training images, the choice of the best epoch."""
    means = results.means(run.epoch_sums)
    run.log.note(
        f"{task.name}, epoch {epoch}: loss {means['loss']:.4f} (penalty {means['penalty']:.4f}), "
        f"training top-1 {means['top1']:.2f} %"
    )
    rows = sorted(set().union(*run.data.held_out)) if run.method.joint else run.data.held_out[task.task_index]
    if not rows:
        return
    now = {name: value.clone() for name, value in run.model.state_dict().items()}
    if run.average:
        run.model.load_state_dict(run.average.averaged_state(run.model))
    with run.timer.within("evaluation"):
        top1 = validation_top1(run.model, run.data.train, rows, run.config.eval_batch_size)
    curves.add_scalar("accuracy/validation_top1", top1, run.step)
    if not run.best or top1 > run.best["top1"]:
        weights = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.best = {"top1": top1, "epoch": epoch, "model": weights}
    run.model.load_state_dict(now)


def finish_training(run: Run, task: Task) -> None:
    """From the last step to the model that is evaluated, and that the next task starts from.

    It is the best epoch's, or the moving average's; BatchNorm's statistics are estimated anew, then the head is trained.
    """
    config, model = run.config, run.model
    if run.best:
        run.log.say(f"the model of epoch {run.best['epoch']} is kept: {run.best['top1']:.2f} % on held-out images")
        model.load_state_dict(run.best["model"])
        run.best = {}
    elif run.average:
        model.load_state_dict(run.average.averaged_state(model))
    if config.bn_reestimate:
        with run.timer.part("bn_reestimate", "step"):
            noise, size = generator(config.seed, "bn", task.task_index), config.train_batch_size
            order = torch.randperm(len(task.pool), generator=noise).to(task.pool_on_image_device.device)
            batches = min(config.bn_reestimate, -(-len(order) // size))
            reestimate_bn(model, (make_batch(task, order, index, size, noise).x for index in range(batches)))
    if config.head_epochs:
        with run.timer.part("head", "step"):
            noise = generator(config.seed, "head", task.task_index)
            train_head(model, task, config.head_epochs, config.train_batch_size, config.lr, noise)


def save(run: Run, *first: Path) -> None:
    """Write checkpoint/last.pt, after ``first``, in the background.

    TensorBoard's curves are on disk before it, so that none has a gap after a resumption.
    """
    with run.timer.within("step"):
        run.sums.cpu()  # the copy of the state waits for the steps that a GPU has still to do, which is their time
    with run.timer.within("checkpoint"):
        run.log.flush()
        run.writer.write(run.state(), *first, Path(run.config.job_dir) / "checkpoint" / checkpoint.LAST)


def train_all(run: Run) -> None:
    """The task loop."""
    run.timer.switch("other")
    while run.task_index < run.num_tasks:
        with run.timer.within("data"):
            task = run.data.task(run.task_index, run.config, run.method.joint)
        task.warn = run.log.warn
        if run.step == 0:
            run.optimizer = run.make_optimizer()
            run.sums.zero_()
            run.scales.limited_updates.zero_()
            with run.timer.part("method", "method"):
                for callback in run.callbacks:
                    callback.begin_task(run.model, task)
            if run.oscillations:
                run.oscillations.begin_task(run.model)
            if run.average:
                run.average = WeightAverage(run.config.ema)
        run.load_teacher(task)
        replay = f" and {len(task.replay)} replay images" if len(task.replay) else ""
        run.log.say(f"{task.name}: {len(task.classes)} classes, {len(task.new_rows)} training{replay}")
        fault_injection.point("task")
        with run.timer.part("training"), preemption.polled(distributed.world_size() == 1):
            train_task(run, task)
        finish_training(run, task)
        fault_injection.point("importance")
        with run.timer.part("method", "method"):
            for callback in run.callbacks:
                callback.end_task(run.model, task)
        distributed.check_agreement(run.model)
        with run.timer.within("logging"):
            results.end_task(run, task)
        fault_injection.point("change")
        run.task_index, run.step = run.task_index + 1, 0
        save(run, run_folder.task_file(run.config.job_dir, task.task_index))


def run(config: Config, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Train as ``config`` says; leaves config.json, results.json, checkpoints and curves in job_dir. Raises UserError."""
    began = time.perf_counter()
    device = pick_device(config)
    distributed.join(device)
    log, folder = Log(), Path(config.job_dir)
    with contextlib.ExitStack() as stack:
        if distributed.rank() > 0:
            config = distributed.follow(config, stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(log.close)
        for line in notes:
            log.say(line)
        dataset = distributed.one_first(lambda: load_dataset(config, device, log.say))
        stack.enter_context(run_folder.locked(Path(config.job_dir), log.say))
        state = run_folder.check(config, log.say)
        num_tasks = 1 if registry.method(config.method).joint else len(dataset.ids)
        if state and state["task_index"] == num_tasks and (finished := results.read(folder)):
            log.say(f"{folder}: this run is finished\n{table(finished)}")
            return finished
        this = Run(config, log, device, dataset, began)
        distributed.check(
            config,
            this.method.batch_separable and this.guard.batch_separable,
            f"{config.method}, penalty {config.penalty}",
        )
        if state:
            path = run_folder.resumed_from(config)
            this.load(state, path)
            if run_folder.moves(config):
                run_folder.begin(config, path.parent, this.task_index)
            log.say(f"resumed at task {this.task_index}, step {this.step}")
        else:
            initialize.prepare(this)
            run_folder.begin(config, Path(config.from_run or "") / "checkpoint", config.start_task)
        log.open(Path(config.job_dir))
        if this.method.regularizer and config.replay_rate == 0 and config.buffer_size is None and num_tasks > 1:
            log.say(ALONE.format(config.method))
        total = sum(len(rows) for rows in dataset.new_rows) * config.num_epochs // config.train_batch_size
        if wants_compile(config, device, total, log.say, state and state.get("compiled")):
            compile_step(this)
        distributed.barrier()  # nobody reads any more what the first is about to write
        with run_folder.explain_disk_errors(folder), this.writer, deterministic(config.deterministic, device):
            train_all(this)
            found = results.finish(this)
        distributed.barrier()  # what a next run begins from is there
        return found
