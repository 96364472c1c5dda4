"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler's state."""

from __future__ import annotations

import math

from lifequant.config import Config


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
