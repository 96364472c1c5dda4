"""What a run says of its progress: a header, a bar on a terminal, and elsewhere a line for each epoch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tqdm import tqdm

from lifequant.common.text import WIDTH, duration
from lifequant.config import Config
from lifequant.data.task import Task
from lifequant.runtime import distributed
from lifequant.training.run import Run
from lifequant.training.schedule import batch_parts, steps_per_epoch

KNOWN_AFTER = 5  # seconds of training steps
AT_TASK_END = ("evaluation", "method", "head", "bn_reestimate")  # parts of the timer


def header(run: Run) -> str:
    """What is trained, on what, where: a line each."""
    config, data = run.config, run.data
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    threads = f", threads: {torch.get_num_threads()}" if run.device.type == "cpu" else ""
    processes = f", processes: {count}" if (count := distributed.world_size()) > 1 else ""
    domains = f" ({', '.join(data.domains)})" if data.domains else ""
    lines = {
        "method": f"{config.method}, loss {config.loss}, sampler {config.sampler}, penalty {config.penalty}",
        "network": f"{config.target_model}, {parameters:,} parameters",
        **_bits(config),
        "data": f"{data.prefix}, classes: {data.num_classes}, tasks: {len(data.ids)}{domains}",
        "images": f"training: {len(data.train.paths):,}, test: {len(data.test.paths):,}",
        "work": f"epochs a task: {config.num_epochs}, steps: {run.steps_before(run.num_tasks):,}, images a step: {config.train_batch_size}, seed: {config.seed}",
        "device": f"{run.device}{threads}{processes}, torch {torch.__version__}",
        "folder": config.job_dir,
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def _bits(config: Config) -> dict[str, str]:
    if config.bitW == config.abitW == 32:
        return {"bits": "32, not quantized"}
    ends = f", {config.first_last_bits} (first and last layer)" if config.bitW < 32 else ""
    quantizers = dict.fromkeys([config.quantizer, config.act_quantizer])
    return {
        "bits": f"{config.bitW} (weights), {config.abitW} (activations){ends}",
        "quantizer": " (weights), ".join(quantizers) + " (activations)" * (len(quantizers) > 1),
    }


def content(task: Task) -> str:
    """A task's classes and images. A stored image that the task has as its own is a new one, and is not counted twice."""
    replayed = f", {len(task.replay)} replayed" if task.buffer_count else ""
    same = task.buffer_count - len(task.replay)
    stored = f" ({task.buffer_count} stored, {same} are new)" if same else ""
    return f"{task.name}: {len(task.classes)} classes, {len(task.new_rows)} new{replayed} images{stored}"


def progress_bar(run: Run, task: Task, steps: int) -> tqdm:
    """A bar of 80 columns for a task's steps; nothing is shown where there is no terminal."""
    return tqdm(
        total=steps,
        initial=run.step,
        desc=task.name,
        leave=False,
        ncols=WIDTH - 1,
        bar_format="{desc} |{bar}|",
        disable=distributed.rank() > 0 or None,
    )


def line(run: Run, task: Task, epoch: int, values: Mapping[str, float]) -> str:
    """Task, epoch from 1, loss, training accuracy, speed and time left."""
    parts = [
        f"{task.name} epoch {epoch + 1}/{run.config.num_epochs}",
        f"loss {values['loss']:.3f}",
        f"top-1 {values['top1']:.1f} %",
    ]
    if speed := run.timer.images_per_second():
        parts.append(f"{_speed(speed)} images/s")
    if (left := seconds_left(run)) is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def show(run: Run, task: Task, bar: tqdm, values: Mapping[str, float]) -> None:
    """Renew the bar's text. In a long first epoch, say how long the run will take as soon as its speed is known."""
    epoch = (run.step - 1) // steps_per_epoch(run.config, *run.task_sizes[run.task_index])
    bar.set_description_str(line(run, task, epoch, values))
    left = seconds_left(run)
    if run.expects_time and (epoch > 0 or run.history["timed_seconds"] > KNOWN_AFTER):
        run.expects_time = False
        if epoch == 0 and left and left > 60:
            run.log.say(f"about {duration(left)} to go, at {_speed(run.timer.images_per_second())} images/s")


def seconds_left(run: Run) -> float | None:
    """Seconds until the run ends, at its mean speed and its mean time at a task's end; None before that is known."""
    speed = run.timer.images_per_second()
    if not speed:
        return None
    steps = run.steps_before(run.num_tasks) - run.global_step
    images = steps * sum(batch_parts(run.config, *run.task_sizes[run.task_index]))
    parts = run.history["seconds_by_part"]
    at_end = sum(parts.get(name, 0.0) for name in AT_TASK_END) / run.task_index if run.task_index else 0.0
    return images / speed + at_end * (run.num_tasks - run.task_index)


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:.{0 if images_per_second >= 10 else 1}f}"
