"""Which of the training images a run trains on: --lt_gamma and --val_fraction."""

from __future__ import annotations

from collections import Counter

from lifequant.common.errors import UserError
from lifequant.config import Config
from lifequant.data.split import long_tail, lowest, share_of_each
from lifequant.data.task_csv import Rows


def long_tail_of(
    config: Config, record: dict, every: dict[int, Rows], label_of: dict[str, int], num_classes: int, say
) -> set[str]:
    """The training images that --lt_gamma keeps, decided over the CSVs of all tasks, whichever of them run."""
    images = sorted({image for rows in every.values() for image, _ in rows})
    done = float(record.get("lt_gamma") or 1)
    if config.lt_gamma == 1 or config.lt_gamma == done:
        if done != 1 and config.lt_gamma == done:
            say(f"--lt_gamma {done:g}: the task CSVs were made so; not thinned again")
        return set(images)
    if done != 1:
        raise UserError(f"--lt_gamma {config.lt_gamma:g}: the task CSVs were made with {done:g}; leave the flag out")
    labels = [label_of[image] for image in images]
    kept = lowest(images, labels, long_tail(Counter(labels), num_classes, config.lt_gamma), config.seed, "long_tail")
    say(f"--lt_gamma {config.lt_gamma:g}: {len(kept)} of {len(images)} training images are kept")
    return {images[index] for index in kept}


def held_out_of(config: Config, kept: set[str], label_of: dict[str, int]) -> set[str]:
    """--val_fraction of each class, never its last image; an image is held out in all tasks or in none."""
    images = sorted(kept)
    labels = [label_of[image] for image in images]
    counts = Counter(labels)
    share = {c: min(n, counts[c] - 1) for c, n in share_of_each(counts, config.val_fraction).items()}
    return {images[index] for index in lowest(images, labels, share, config.seed, "validation")}
