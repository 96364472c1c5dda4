"""What happens at which step: the learning rate, readings and evaluations, as pure functions of the step.

So a resumed run needs no scheduler's state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lifequant.config import Config
from lifequant.data import task
from lifequant.runtime import distributed

READINGS = 100  # of the loss over a task
SHORTEST = {"cpu": 5, "cuda": 20}  # steps between two readings, which take time, and which a GPU waits for
LONGEST = 50
POINTS = 20  # test accuracies over a run
SHARE = 0.05  # of a run's work, what evaluations within tasks may add to it
TRAINING = {False: 3, True: 1}  # a training image's work in test images, by whether the step is compiled; a test is not


def batch_parts(config: Config, new: int, stored: int) -> tuple[int, int]:
    """(new images, stored images beside them) of a training step of all processes, where a task trains on ``new`` images
    and on ``stored`` ones of former tasks; (images, 0) where both are one pool."""
    return task.batch_parts(config.train_batch_size, config.replay_batch, new, stored, distributed.world_size())


def steps_per_epoch(config: Config, new: int, stored: int) -> int:
    """Steps of an epoch; the last one is filled up."""
    size, beside = batch_parts(config, new, stored)
    return -(-(new if beside else new + stored) // size)


def epoch_images(config: Config, new: int, stored: int) -> int:
    """Images that an epoch trains on."""
    beside = batch_parts(config, new, stored)[1]
    return new + (steps_per_epoch(config, new, stored) * beside if beside else stored)


def reading_interval(config: Config, steps: int, device: str) -> int:
    """Steps between two readings of the loss, in a task of ``steps`` steps on ``device`` ("cpu" or "cuda")."""
    return config.print_freq or min(max(steps // READINGS, SHORTEST[device]), LONGEST)


def evaluation_interval(config: Config, epochs: Sequence[int], test_images: int, compiled: bool) -> int:
    """Epochs between two evaluations within a task; ``num_epochs`` where only the ends of tasks are evaluated.

    ``epochs``: images of an epoch of each task; ``test_images``: of one evaluation; ``compiled``: whether the step is.
    """
    if config.eval_every:
        return config.eval_every
    affordable = SHARE * TRAINING[compiled] * config.num_epochs * sum(epochs)
    for interval in range(1, config.num_epochs):
        points = len(epochs) * -(-config.num_epochs // interval)
        if points <= POINTS and (points - len(epochs)) * test_images <= affordable:
            return interval
    return config.num_epochs


def lr_factor(config: Config, step: int, steps_per_epoch: int) -> float:
    """Share of ``config.lr`` at a step of a task, in (0, 1].

    cosine falls to 0; onecycle climbs from 1/25 over the first 30 %, then falls as a cosine (Smith & Topin 2018);
    multistep decays at the given epochs, by default at half and three quarters. Warm-up is linear.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step + 1 <= warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(config.num_epochs * steps_per_epoch - warmup, 1)
    if config.sched == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if config.sched == "onecycle":
        climb = 0.3
        if progress < climb:
            return 1 / 25 + (1 - 1 / 25) * progress / climb
        return max((1 + math.cos(math.pi * (progress - climb) / (1 - climb))) / 2, 1e-4)
    if config.sched == "multistep":
        epoch = step // steps_per_epoch
        if config.lr_decay_step:
            return config.lr_gamma ** (epoch // config.lr_decay_step)
        at = config.lr_decay_steps or (config.num_epochs / 2, config.num_epochs * 3 / 4)
        return config.lr_gamma ** sum(epoch >= milestone for milestone in at)
    return 1.0
