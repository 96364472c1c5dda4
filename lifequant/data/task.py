"""What a run trains on: a batch, and a task of the sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lifequant.data.ahead import ahead, load_batches, pays
from lifequant.data.augment import CIFAR, Statistics, crop_and_flip, normalize, ready
from lifequant.data.codec import CodedImages
from lifequant.data.image_storage import send, take
from lifequant.data.photographs import EncodedImages, Photographs


class Batch(NamedTuple):
    """One training batch on the device."""

    x: Tensor  # float32 [N, 3, H, W], augmented and normalized
    y: Tensor  # int64 [N]
    is_replay: Tensor  # bool [N]
    rows: Tensor  # int64 [N], rows of the image store
    teacher: Tensor | None = None  # float32 [N, C], logits of the former task's model, where something asks for them


class Epoch(NamedTuple):
    """The batches of an epoch, a row for each: what a training step then takes is there already, and costs a GPU nothing."""

    image_rows: Tensor  # int64 [batches, N], ``rows`` on the device of the images
    y: Tensor  # int64 [batches, N]
    is_replay: Tensor  # bool [batches, N]
    rows: Tensor  # int64 [batches, N]


def batch_parts(size: int, share: float, new: int, stored: int, multiple: int = 1) -> tuple[int, int]:
    """(new images, stored images beside them) in each batch of at most ``size`` images, of which ``share`` is stored.

    ``new`` and ``stored``: images of the task. If the stored ones are a larger share of both, that share holds. A batch has no stored image twice, and at least one new image. A share of 0
    gives (images of the merged pool, 0). The sum is a multiple of ``multiple``.
    """
    beside = bool(share and stored)
    share = max(share, stored / (new + stored)) if beside else share
    most = new + (min(stored, max(1, round(new * share / (1 - share)))) if beside else stored)
    size = min(size, most)
    size = max(size - size % multiple, multiple)
    drawn = min(max(1, round(share * size)), stored, size - 1) if beside else 0
    return size - drawn, drawn


@dataclass
class Task:
    """What a method may know of a task: training and replay data, never test data."""

    task_index: int  # in the sequence, from 0
    classes: list[int]  # labels of the new data
    images: (
        Tensor | EncodedImages
    )  # uint8 [all training images of the run, 3, H, W]; in a loop of your own also float, ready for the model
    labels: Tensor  # int64 [all training images of the run]
    new_rows: Tensor  # int64, rows of the task's own images
    replay: Tensor  # int64, rows of the stored images of former tasks, none of them in ``new``
    past_rows: Tensor  # int64, rows of all images of former tasks, stored or not; only to be counted
    num_classes: int
    batch_size: int
    buffer_count: int = 0  # images in the replay store, those that ``new`` has as well included
    warn: Callable[[str], None] = field(default=lambda text: None)
    augment: Callable[[Tensor, torch.Generator], Tensor] = crop_and_flip  # uint8 [N, 3, H, W] -> the same
    statistics: Statistics = CIFAR  # by which images are normalized
    csv_id: int | None = None  # the number in the CSV's name, which messages show; None: the index
    stable_rows: bool = True  # a row is the same image in every task, so that what is known of it can be kept by row
    coded: CodedImages | None = None  # what went through the codec of ``--replay_codec``
    replay_bytes: Callable[[], int] | None = None  # of the images in the replay store
    replay_batch: float = 0.0  # share of each batch that is stored images; 0: new and stored ones are one pool
    pool: Tensor = field(init=False)  # int64, rows of what the task trains on: new, then replay
    counts: Tensor = field(init=False)  # float32 [C], images of each class that an epoch draws, before any sampler
    epochs_of_replay: float = field(init=False)  # times that an epoch draws a stored image, on average; 1 for one pool
    old_classes: Tensor = field(init=False)  # bool [C], classes of former tasks

    def __post_init__(self) -> None:
        self.pool = torch.cat([self.new_rows, self.replay])
        new, stored = len(self.new_rows), len(self.replay)
        drawn, beside = batch_parts(self.batch_size, self.replay_batch, new, stored)
        self.epochs_of_replay = beside / drawn * new / stored if beside else 1.0
        of_new, of_stored = (
            torch.bincount(self.labels[rows], minlength=self.num_classes).float()
            for rows in (self.new_rows, self.replay)
        )
        self.counts = of_new + self.epochs_of_replay * of_stored
        self.old_classes = torch.bincount(self.labels[self.past_rows], minlength=self.num_classes) > 0

    @property
    def id(self) -> int:
        """The same as ``task_index``."""
        return self.task_index

    @property
    def name(self) -> str:
        """The name in messages: "task 3" is the task of <data set>_train3.csv."""
        return f"task {self.task_index if self.csv_id is None else self.csv_id}"

    def take(self, rows: Tensor, image_rows: Tensor | None = None) -> Tensor:
        """These rows of the images, as they come out of the codec if they are coded, on the task's device.

        ``image_rows``: ``rows`` on the images' device, where they are there already.
        """
        found = take(self.images, rows if image_rows is None else image_rows, self.labels.device)
        return self.coded.over(found, rows) if self.coded else found

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(x, y) of these rows, not augmented."""
        return ready(self.take(rows), self.labels.device, self.statistics), self.labels[rows]

    def batches(self, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The ``batch`` of each ``size`` rows in turn, so that no more images are held at a time."""
        parts = rows.split(size)
        if self.coded:
            return map(self.batch, parts)
        x = load_batches(self.images, parts, self.labels.device, self.statistics)
        return ((batch, self.labels[part]) for batch, part in zip(x, parts, strict=True))

    def epoch(self, order: Tensor, size: int) -> Epoch:
        """The batches of ``size`` images in ``order`` (int64, indices into ``pool``); the last is filled up from the
        beginning."""
        batches = -(-len(order) // size)
        order = order[torch.arange(batches * size, device=order.device) % len(order)].view(batches, size)
        chosen = order.to(self.pool.device)
        rows = self.pool[chosen]
        return Epoch(rows.to(self.images.device), self.labels[rows], chosen >= len(self.new_rows), rows)

    def training_batch(self, epoch: Epoch, index: int, generator: torch.Generator) -> Batch:
        """Batch ``index`` of an epoch, augmented."""
        return self._batch(epoch, index, self._augmented(self.labels.device, epoch, index, generator))

    def training_batches(self, draws: Iterable[tuple[Epoch, int, torch.Generator]]) -> Iterator[Batch]:
        """The ``training_batch`` of each of ``draws`` in turn. Large images are made by threads, before they are asked for."""
        device = self.labels.device
        if self.coded or not pays(self.images, device):
            yield from (self.training_batch(*draw) for draw in draws)
            return
        with closing(ahead(lambda draw: (*draw[:2], self._augmented(device, *draw)), draws)) as made:
            for epoch, index, x in made:
                yield self._batch(epoch, index, x)

    def _augmented(self, device: torch.device, epoch: Epoch, index: int, generator: torch.Generator) -> Tensor:
        """The augmented images of a batch, normalized if they are on ``device``, the run's: uint8 or float32 [N, 3, H, W]."""
        rows = epoch.image_rows[index]
        if isinstance(self.images, Photographs):
            images = self.images.crops(rows, generator)
        elif isinstance(self.images, EncodedImages) and not self.coded:
            images = self.augment(self.images[rows], generator)
        else:
            images = self.augment(self.take(epoch.rows[index], rows), generator)
        return normalize(images, self.statistics) if images.device == device else images

    def _batch(self, epoch: Epoch, index: int, x: Tensor) -> Batch:
        _, y, is_replay, rows = (part[index] for part in epoch)
        return Batch(
            x if x.is_floating_point() else normalize(send(x, self.labels.device), self.statistics), y, is_replay, rows
        )


def user_task(
    task_index: int,
    x: Tensor,
    y: Tensor,
    replay_x: Tensor | None = None,
    replay_y: Tensor | None = None,
    past_y: Tensor | None = None,
    *,
    num_classes: int,
    batch_size: int = 128,
) -> Task:
    """A Task for a training loop of your own: its images, those stored of former tasks, the labels of all former images.

    x, replay_x: float [N, ...], ready for the model (or uint8 [N, 3, H, W], which are normalized); y, replay_y, past_y:
    int64. ``task_index`` counts from 0. ``past_y`` has the labels of all images of former tasks, the stored ones among them; left
    out, those of the stored ones alone. A replay image's row, for Batch.rows, is len(x) + its place in ``replay_x``.
    """
    replay_x = x[:0] if replay_x is None else replay_x
    replay_y = y[:0] if replay_y is None else replay_y
    past_y = replay_y if past_y is None else past_y
    new, stored, past = (torch.arange(len(labels), device=y.device) for labels in (y, replay_y, past_y))
    return Task(
        task_index=task_index,
        classes=sorted(set(y.tolist())),
        images=torch.cat([x, replay_x]),
        labels=torch.cat([y, replay_y, past_y]),
        new_rows=new,
        replay=len(y) + stored,
        past_rows=len(y) + len(stored) + past,
        num_classes=num_classes,
        batch_size=batch_size,
        buffer_count=len(stored),
        stable_rows=False,
    )
