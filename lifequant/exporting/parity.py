"""The network and its file on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

EXACT_EQUAL = 99.9  # percent of predictions
FAST_LOSS = 0.3  # points of accuracy


@dataclass
class Parity:
    """Accuracies in percent, None without labels; ``equal`` is percent of predictions."""

    images: int
    accuracy: tuple[float, float] | None  # of the network, of the file
    equal: float
    difference: float  # the largest of two logits
    lost: float  # points, of the file against the network
    noise: float  # two standard deviations of ``lost``, if each changed prediction were as likely a gain

    def __str__(self) -> str:
        tops = (
            ""
            if self.accuracy is None
            else "top-1 {:.2f} % in the network and {:.2f} % in the file, ".format(*self.accuracy)
        )
        return f"{tops}{self.equal:.2f} % equal predictions, largest difference of logits {self.difference:.2g}"

    def excuse(self) -> str:
        """Why a loss above what is allowed does not count; empty where there is none."""
        if not FAST_LOSS < self.lost <= self.noise:
            return ""
        return (
            f"the loss of {self.lost:.2f} points may be chance: up to {self.noise:.2f} is, where so many of {self.images} "
            "predictions change; more images (--images) tell more"
        )

    def failure(self, form: str) -> str:
        """Why the file must not be kept; empty if it may.

        Where a few predictions change, some for the better and some for the worse, a small loss is chance: it counts if it
        is larger than that, too.
        """
        if form == "exact" and self.equal < EXACT_EQUAL and round(self.images * (100 - self.equal) / 100) > 1:
            return f"{self.equal:.2f} % of the predictions are equal, {EXACT_EQUAL} % are needed"
        if form == "fast" and self.accuracy is not None and self.lost > max(FAST_LOSS, self.noise):
            return f"it loses {self.lost:.2f} points of top-1, at most {FAST_LOSS} are allowed"
        return ""


def compare(network: np.ndarray, file: np.ndarray, labels: np.ndarray | None) -> Parity:
    """``network`` and ``file`` are logits [N, C]; ``labels`` int [N], or None."""
    ours, theirs = network.argmax(1), file.argmax(1)
    accuracy, lost, noise = None, 0.0, 0.0
    if labels is not None:
        right, still = ours == labels, theirs == labels
        accuracy = 100 * float(right.mean()), 100 * float(still.mean())
        lost, noise = accuracy[0] - accuracy[1], 200 * math.sqrt(int((right != still).sum())) / len(labels)
    return Parity(
        len(ours), accuracy, 100 * float((ours == theirs).mean()), float(np.abs(network - file).max()), lost, noise
    )
