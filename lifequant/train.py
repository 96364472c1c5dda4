"""run(config): the task loop and THE training step.

All that is random comes from generators seeded by (seed, purpose, task, epoch or step). So the task and the number of steps
done say where a run stands, and a run that is killed and resumed draws what it would have drawn.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lifequant import registry
from lifequant.checkpointing import checkpoint, run_folder
from lifequant.common import fault_injection
from lifequant.common.seeding import generator, seed_for
from lifequant.common.text import duration
from lifequant.config import Config
from lifequant.data.dataset import load_dataset
from lifequant.data.replay import epoch_of
from lifequant.data.task import Batch, Epoch, Task
from lifequant.losses import distillation
from lifequant.models.build import check_model
from lifequant.results import curves, results
from lifequant.results.table import table
from lifequant.runtime import distributed, preemption
from lifequant.runtime.device import deterministic, lacks_bfloat16, memory_explained, pick_device, tf32, wants_compile
from lifequant.runtime.log import Log
from lifequant.training import history, initialize, progress, schedule
from lifequant.training.compiling import compile_step, keep_in_place
from lifequant.training.divergence import skip_step, stop_at_last_checkpoint
from lifequant.training.ema import MovingAverage
from lifequant.training.memory import left_for_images
from lifequant.training.replay_store import choose
from lifequant.training.run import Run
from lifequant.training.task_end import end_epoch, finish_training

ALONE = (
    "{}: without replay nothing compares old classes with new ones, so a head that all tasks share forgets nearly "
    "everything (van de Ven et al. 2022); the task-masked accuracy is where such methods differ"
)

EMULATED = "--amp bf16: this CPU has no bfloat16 instructions, so a step takes many times as long as with --amp off"

SAME_CLASSES = "{}: it holds weights for classes that a task no longer has; all domains have the same, so it is 0"


def losses(run: Run, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(the loss, its terms in the order of ``run.term_names``, history.step_sums), the latter two without gradients.

    This is the part of the step that torch.compile takes whole.
    """
    with run.autocast():
        logits = run.model(batch.x)
    logits = logits.float()
    terms = [run.method.task_loss(logits, batch)]
    if run.config.distill and batch.teacher is not None:
        old = distillation(logits, batch.teacher, run.old_classes, run.config.distill_temperature)
        terms.append(run.config.distill * run.old_class_share * old)
    penalty = run.penalty.penalty(run.model) + run.penalty.output_penalty(logits, batch)
    terms.append(run.config.ll_lambda * penalty)
    values = torch.stack([term.detach() for term in terms])
    return sum(terms), values, history.step_sums(logits.detach(), batch.y, values)


def training_step(run: Run, batch: Batch, factor: float) -> Tensor:
    """THE training step, at ``factor`` times the learning rate; returns history.step_sums. It does not wait for a GPU."""
    model, optimizer = run.model, run.optimizer
    optimizer.zero_grad()  # before the forward pass: a CUDA graph takes back the memory of the former step's gradients
    if run.compiled and run.device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    run.finite_check.before_step()
    batch = run.with_teacher(batch)
    loss, terms, sums = run.compiled_losses(batch) if run.compiled_losses else losses(run, batch)
    loss.backward()
    distributed.average_gradients(model)
    if not run.finite_check.is_finite(terms, factor * run.config.lr):
        return skip_step(run, batch, terms, save)
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
        if run.ema:
            run.ema.update()
        return distributed.total(sums)


def draws(
    run: Run, task: Task, parts: tuple[int, int], steps_per_epoch: int, steps: int
) -> Iterator[tuple[Epoch, int, torch.Generator]]:
    """What decides each batch of ``parts`` = (new, stored) images from step ``run.step`` on: its epoch, its place there, its augmentation's
    generator."""
    seed, batches = run.config.seed, None
    for step in range(run.step, steps):
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0 or batches is None:
            noise = generator(seed, "order", task.task_index, epoch)
            batches = epoch_of(task, parts, run.config.sampler, noise)
        yield batches, index, generator(seed, "augment", task.task_index, step)


def train_task(run: Run, task: Task) -> None:
    """Train on one task, from ``run.step`` steps on."""
    config = run.config
    parts = schedule.batch_parts(config, *run.task_sizes[run.task_index])
    steps_per_epoch = schedule.steps_per_epoch(config, *run.task_sizes[run.task_index])
    steps = config.num_epochs * steps_per_epoch
    run.reading_interval = schedule.reading_interval(config, steps, run.device.type)
    batches = task.training_batches(draws(run, task, parts, steps_per_epoch, steps))
    if run.compiled and run.device.type == "cuda":
        keep_in_place(run)
    run.timer.begin_task()
    bar = progress.progress_bar(run, task, steps)
    run.model.train()
    while run.step < steps:
        run.timer.switch("data")
        epoch, index = divmod(run.step, steps_per_epoch)
        batch = next(batches)
        torch.manual_seed(
            seed_for(config.seed, "dropout", task.task_index, run.step)
        )  # it draws from torch's own generator
        factor = schedule.lr_factor(config, run.step, steps_per_epoch)
        run.timer.switch("step")
        with tf32(config.tf32 and run.device.type == "cuda"):
            sums = training_step(run, distributed.share(batch), factor)
        run.sums += sums
        if index == 0:
            run.epoch_sums.zero_()
        run.epoch_sums += sums  # in place: a CUDA graph takes ``sums`` back at its next step
        run.step += 1
        run.timer.step(sum(parts))
        run.timer.switch("logging")
        bar.update()
        if run.step % run.reading_interval == 0 or run.step == steps:
            results.read_window(run, task, bar, config.lr * factor)
        if run.step % steps_per_epoch == 0:
            end_epoch(run, task, epoch, run.log.curves)
            curves.evaluate_within(run, epoch)
        due = run.timer.since_checkpoint() > config.checkpoint_seconds and run.step < steps
        if due or preemption.requested():
            save(run)
        if preemption.requested():
            run.writer.wait()
            preemption.stop()
    bar.close()


def save(run: Run, *first: Path) -> None:
    """Write the files ``first``, then checkpoint/last.pt, in the background.

    TensorBoard's curves are on disk before, so that none has a gap after a resumption.
    """
    with run.timer.within("step"):
        stop_at_last_checkpoint(run)  # waits for the steps that a GPU has still to do, which is their time
    with run.timer.within("checkpoint"):
        run.log.flush()
        run.writer.write(run.state(), *first, Path(run.config.job_dir) / "checkpoint" / checkpoint.LAST)


def begin_task(run: Run, task: Task) -> None:
    """What precedes the first step of a task."""
    run.optimizer = run.make_optimizer()
    run.sums.zero_()
    run.scales.limited_updates.zero_()
    with run.timer.part("method", "method"):
        for callback in run.callbacks:
            callback.begin_task(run.model, task)
    if run.oscillations:
        run.oscillations.begin_task(run.model)
    if run.ema:
        run.ema = MovingAverage(run.model, run.config.ema)
    if run.config.memory_budget is not None:
        left_for_images(run, task)  # refuses what exceeds the budget before a step is trained


def end_task(run: Run, task: Task) -> None:
    """What follows the last step of a task, evaluation apart."""
    with run.timer.part("method", "method"):
        for callback in run.callbacks:
            callback.end_task(run.model, task)
        choose(run, task)
    distributed.check_agreement(run.model)


def train_all(run: Run) -> None:
    """The task loop."""
    run.timer.switch("other")
    while run.task_index < run.num_tasks:
        with run.timer.within("data"):
            task = run.data.task(run.task_index, run.config, run.method.joint)
            if task.coded:
                task.coded.code()
        task.warn = run.log.warn
        if run.step == 0:
            begin_task(run, task)
        run.load_teacher(task)
        run.log.say(progress.content(task))
        fault_injection.point("task")
        caller_draws = torch.random.fork_rng(devices=[])  # as the caller had them, since each step seeds the generator
        with run.timer.part("training"), preemption.polled(distributed.world_size() == 1), caller_draws:
            train_task(run, task)
        finish_training(run, task)
        fault_injection.point("importance")
        end_task(run, task)
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
    this: Run | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_explained(lambda: this.at() if this else ("startup", "before the first task")))
        if distributed.rank() > 0:
            config = distributed.follow(config, stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(log.close)
        for line in notes:
            log.say(line)
        check_model(config)
        dataset = distributed.one_first(lambda: load_dataset(config, device, log.say))
        stack.enter_context(run_folder.locked(Path(config.job_dir), log.say))
        state = run_folder.check(config, log.say)
        num_tasks = 1 if registry.method(config.method).joint else len(dataset.ids)
        if state and state["task_index"] == num_tasks and (finished := results.read(folder)):
            log.say(f"this run is finished: {folder}\n{table(finished)}")
            return finished
        this = Run(config, log, device, dataset, began)
        log.say(progress.header(this))
        if config.amp == "bf16" and lacks_bfloat16(device):
            log.say(EMULATED)
        distributed.check(
            config,
            this.method.batch_separable and this.penalty.batch_separable,
            f"{config.method}, penalty {config.penalty}",
        )
        if state:
            path = run_folder.resumed_from(config)
            checkpoint.refuse_other_run(state, this.data_key, distributed.world_size(), path)
            this.load(state, path)
            if run_folder.moves(config):
                run_folder.begin(config, path.parent, this.task_index)
            log.say(f"resumed at task {this.task_index}, step {this.step}")
        else:
            initialize.prepare(this)
            run_folder.begin(config, Path(config.from_run or "") / "checkpoint", config.start_task)
        log.open(Path(config.job_dir))
        if dataset.domains and config.penalty in ("proxq", "proxq_step"):
            log.say(SAME_CLASSES.format(config.penalty))
        alone = this.method.regularizer and config.replay_rate == 0 and config.buffer_size is None
        if alone and num_tasks > 1 and not dataset.domains:
            log.say(ALONE.format(config.method))
        total = sum(len(rows) for rows in dataset.new_rows) * config.num_epochs // config.train_batch_size
        if wants_compile(config, device, total, log.say, state and state.get("compiled")):
            compile_step(this, losses)
        distributed.barrier()  # nobody reads any more what the first is about to write
        with run_folder.explain_disk_errors(folder), this.writer, deterministic(config.deterministic):
            curves.begin(this)
            train_all(this)
            found = results.finish(this)
            run_folder.finish(config, num_tasks)
        distributed.barrier()  # what a next run begins from is there
        log.say(f"finished in {duration(time.perf_counter() - began)}; results.json and model_best.pt are in {folder}")
        return found
