"""From the last step of an epoch or a task to the model that is kept."""

from __future__ import annotations

from typing import Any

from lifequant.common.seeding import generator
from lifequant.data.replay import epoch_of
from lifequant.data.task import Task
from lifequant.evaluation.evaluate import validation_top1
from lifequant.qat.batchnorm import reestimate_bn
from lifequant.training import progress, schedule
from lifequant.training.head import train_head
from lifequant.training.history import means
from lifequant.training.run import Run


def end_epoch(run: Run, task: Task, epoch: int, curves: Any) -> None:
    """Say how the epoch went; with held-out training images, choose the best epoch."""
    run.log.epoch(progress.line(run, task, epoch, means(run.epoch_sums, run.term_names)))
    rows = sorted(set().union(*run.data.held_out)) if run.method.joint else run.data.held_out[task.task_index]
    if not rows:
        return
    trained = {name: value.clone() for name, value in run.model.state_dict().items()}
    if run.ema:
        run.model.load_state_dict(run.ema.averaged_state())
    with run.timer.within("evaluation"):
        top1 = validation_top1(run.model, run.data.train, rows, run.config.eval_batch_size)
    curves.add_scalar("1_accuracy/validation_top1", top1, run.global_step)
    if not run.best or top1 > run.best["top1"]:
        weights = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.best = {"top1": top1, "epoch": epoch, "model": weights}
    run.model.load_state_dict(trained)


def finish_training(run: Run, task: Task) -> None:
    """From the last step to the model that is evaluated, and that the next task starts from.

    It is the best epoch's, or the moving average's, or the last one. Then BatchNorm's statistics are estimated anew
    (``--bn_reestimate``) and the head is trained (``--head_epochs``).
    """
    config, model = run.config, run.model
    if run.best:
        run.log.say(f"the model of epoch {run.best['epoch'] + 1} is kept: {run.best['top1']:.2f} % on held-out images")
        model.load_state_dict(run.best["model"])
        run.best = {}
    elif run.ema:
        model.load_state_dict(run.ema.averaged_state())
    size = config.train_batch_size
    if config.bn_reestimate:
        with run.timer.part("bn_reestimate", "step"):
            noise = generator(config.seed, "bn", task.task_index)
            parts = schedule.batch_parts(config, *run.task_sizes[run.task_index])
            epoch = epoch_of(task, parts if parts[1] else (size, 0), "uniform", noise)
            batches = range(min(config.bn_reestimate, len(epoch.rows)))
            reestimate_bn(model, (task.training_batch(epoch, index, noise).x for index in batches))
    if config.head_epochs:
        with run.timer.part("head", "step"):
            train_head(
                model, task, config.head_epochs, size, config.lr, generator(config.seed, "head", task.task_index)
            )
