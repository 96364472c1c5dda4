"""Task CSVs -> checked tables -> decoded images. Training and test images are two stores that share nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lifequant.common.commands import command
from lifequant.common.errors import UserError, closest
from lifequant.common.safe_files import MOST_CLASSES, short
from lifequant.config import REPLAY_RATE, Config
from lifequant.data import dataset_json
from lifequant.data.ahead import load_batches
from lifequant.data.augment import CIFAR, Statistics, augmentation, statistics_of
from lifequant.data.codec import CodedImages, label_bytes
from lifequant.data.image_root import checked_images, image_root
from lifequant.data.image_stores import open_images
from lifequant.data.photographs import EncodedImages
from lifequant.data.replay import stored_rows
from lifequant.data.replay_csv import read_replay_csvs
from lifequant.data.same_images import Spellings, Tables
from lifequant.data.task import Task
from lifequant.data.task_csv import Rows, csv_name, leaves_root, prefixes, read_rows, task_numbers
from lifequant.data.training_images import held_out_of, long_tail_of


@dataclass
class Store:
    """Images, each once, with their labels."""

    paths: list[str]
    labels: Tensor  # int64 [N]
    images: Tensor | EncodedImages  # uint8 [N, 3, H, W], where image_storage says
    statistics: Statistics = CIFAR  # by which they are normalized

    def batches(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """float32 [len(rows), 3, H, W] of the rows of each part in turn, not augmented, on the labels' device."""
        return load_batches(self.images, parts, self.labels.device, self.statistics)


@dataclass
class DataSet:
    """What a run trains and tests on. A task's index is its position in ``ids``."""

    prefix: str
    class_names: list[str]
    ids: list[int]
    train: Store
    test: Store
    new_rows: list[list[int]]  # rows in train, a list a task
    held_out: list[list[int]]  # rows in train: validation images, never trained on or stored
    replay_csv: list[list[int]] | None  # rows in train to be stored of each task, where CSVs say so
    test_rows: list[list[int]]  # rows in test
    domains: list[str] | None = None  # the tasks' names, where each task is a domain
    chosen: list[list[int]] = field(
        default_factory=list
    )  # rows stored after each task so far, where the run chooses them
    _stored: dict[tuple, list[list[int]]] = field(default_factory=dict)  # what was asked for, after each task

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def classes(self, task_index: int) -> list[int]:
        """Labels of a task: of its training and its test images."""
        train = self.train.labels[self.new_rows[task_index]].tolist()
        return sorted({*train, *self.test.labels[self.test_rows[task_index]].tolist()})

    def stored(self, tasks: int, config: Config) -> list[int]:
        """Rows in train that are kept for replay after the first ``tasks`` tasks.

        Where the run chooses them at the end of each task, those of later tasks are a guess of how many there will be.
        """
        if (config.replay_rate == 0 and config.buffer_size is None) or tasks == 0:
            return []
        if tasks <= len(self.chosen):
            return sorted(self.chosen[tasks - 1])
        if self.replay_csv is not None and config.buffer_size is None:
            return sorted(set().union(*self.replay_csv[:tasks]))
        buffer = config.buffer_size
        if config.memory_budget is not None:
            room = config.memory_budget // self.train.images[0].nbytes
            buffer = max(1, len(self.chosen[-1]) if self.chosen else min(room, buffer or room))
        choice = (REPLAY_RATE if config.replay_rate is None else config.replay_rate, buffer, config.seed)
        if choice not in self._stored:
            labels = self.train.labels.tolist()
            self._stored[choice] = list(stored_rows(self.train.paths, labels, self.new_rows, *choice))
        return self._stored[choice][tasks - 1]

    def chooses(self, config: Config) -> bool:
        """Whether what is stored depends on the run, and not on the seed alone."""
        stores = config.replay_rate != 0 or config.buffer_size is not None
        return stores and (config.replay_selection != "random" or config.memory_budget is not None)

    def task(self, task_index: int, config: Config, joint: bool = False) -> Task:
        """What a method sees of the task; with ``joint`` all tasks are one."""
        new = sorted(set().union(*self.new_rows)) if joint else self.new_rows[task_index]
        past = [] if joint else self.new_rows[:task_index]
        stored = [] if joint else self.stored(task_index, config)
        here, rows = set(new), self._rows
        coded = self.coded({*stored, *new} if config.replay_code_new else {*stored} - here, config)

        def replay_bytes() -> int:
            if coded is None:
                return len(stored) * self.train.images[0].nbytes
            kept = coded if config.replay_code_new else self.coded(stored, config)
            return sum(kept.sizes_of(rows(stored))) + len(stored) * label_bytes(self.num_classes)

        return Task(
            task_index=task_index,
            csv_id=self.ids[task_index],
            classes=sorted({*self.train.labels[new].tolist()}),
            images=self.train.images,
            labels=self.train.labels,
            new_rows=rows(new),
            replay=rows([r for r in stored if r not in here]),
            past_rows=rows(set().union(*past) if past else []),
            num_classes=self.num_classes,
            batch_size=config.train_batch_size,
            buffer_count=len(stored),
            augment=augmentation(config),
            statistics=self.train.statistics,
            coded=coded,
            replay_bytes=replay_bytes,
            replay_batch=config.replay_batch,
        )

    def coded(self, rows: Iterable[int], config: Config) -> CodedImages | None:
        """These training images as the codec of the replay store gives them back; None for ``raw``."""
        if config.replay_codec == "raw":
            return None
        return CodedImages(self.train.images, self._rows(rows), config.replay_codec, config.replay_quality)

    def _rows(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(sorted(values), dtype=torch.int64, device=self.train.labels.device)

    def task_sizes(self, config: Config, joint: bool = False) -> list[tuple[int, int]]:
        """How many images each task trains on: (new, stored of former tasks)."""
        found = (self.task(task_index, config, joint) for task_index in range(1 if joint else len(self.ids)))
        return [(len(task.new_rows), len(task.replay)) for task in found]


def load_dataset(config: Config, device: torch.device, say: Callable[[str], None]) -> DataSet:
    """Read, check and decode everything that ``config`` asks for; ``say`` takes lines for the user. Raises UserError."""
    folder = Path(config.csv_dir)
    if not folder.is_dir():
        raise UserError(f"--csv_dir {folder}: no such folder; make the task CSVs: {command('tasks')}")
    prefix = _prefix(folder, config.dataset)
    record = dataset_json.read(folder) or {}
    record = record if record.get("name") == prefix else {}
    present = task_numbers(folder, prefix, "train")
    wanted = config.num_tasks or present[-1] + 1
    ids = range(wanted) if config.task_id is None else [config.task_id]
    for task in ids:  # before a list of them is made: one file name could make it endless
        if task not in present:
            flag = "--num_tasks" if config.task_id is None else "--task_id"
            raise UserError(
                f"{flag}: {csv_name(prefix, 'train', task)} is not in {folder} (tasks there: {_listed(present)})"
            )
    ids = list(ids)
    every = {task: read_rows(folder / csv_name(prefix, "train", task)) for task in present}
    tests = {task: read_rows(folder / csv_name(prefix, "test", task)) for task in task_numbers(folder, prefix, "test")}
    for task in ids:
        if task not in tests:
            raise UserError(f"{folder}: {csv_name(prefix, 'test', task)} is missing; make it with --source test")
    names = _class_names(config, record, [*every.values(), *tests.values()], folder)
    tables = {("train", t): rows for t, rows in every.items()} | {("test", t): rows for t, rows in tests.items()}
    _check_labels(folder, prefix, tables, names)
    root = image_root(config, record, folder, prefix)
    spellings = Spellings(root, tables, folder, prefix, say)
    every = {t: spellings.tables["train", t] for t in every}
    tests = {t: spellings.tables["test", t] for t in tests}
    label_of = {image: label for rows in spellings.tables.values() for image, label in rows}

    kept = long_tail_of(config, record, every, label_of, len(names), say)
    held = held_out_of(config, kept, label_of)
    new = [[image for image, _ in every[t] if image in kept and image not in held] for t in ids]
    held_out = [[image for image, _ in every[t] if image in held] for t in ids]
    for t, images in zip(ids, new, strict=True):
        if not images:
            raise UserError(f"{folder / csv_name(prefix, 'train', t)}: no training image is left for task {t}")
    replay = read_replay_csvs(config, folder, prefix, ids, every, spellings, say)
    if replay is not None:
        replay = [[image for image in images if image in kept and image not in held] for images in replay]

    train = sorted(set().union(*new, *held_out))
    test = sorted({image for t in ids for image, _ in tests[t]})
    stats = checked_images(root, sorted({*train, *test}), prefix, record.get("linked") or [])
    images = open_images(config, root, prefix, {"train": train, "test": test}, stats, device, say)

    def store(paths: list[str], kind: str) -> Store:
        labels = torch.tensor([label_of[p] for p in paths], device=device)
        return Store(paths, labels, images[kind], statistics_of(config))

    row_of = {path: i for i, path in enumerate(train)}
    test_row_of = {path: i for i, path in enumerate(test)}
    return DataSet(
        prefix=prefix,
        class_names=names,
        ids=ids,
        train=store(train, "train"),
        test=store(test, "test"),
        new_rows=[sorted(row_of[p] for p in images) for images in new],
        held_out=[sorted(row_of[p] for p in images) for images in held_out],
        replay_csv=replay and [sorted(row_of[p] for p in images) for images in replay],
        test_rows=[sorted(test_row_of[p] for p, _ in tests[t]) for t in ids],
        domains=dataset_json.domains_of(record, ids),
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _prefix(folder: Path, wanted: str | None) -> str:
    present = prefixes(folder)
    if not present:
        raise UserError(f"--csv_dir {folder}: no task CSVs (<name>_train0.csv); make them: {command('tasks')}")
    if wanted is None and len(present) > 1:
        raise UserError(f"--csv_dir {folder} has CSVs of {' and '.join(present)}: choose one by --dataset")
    prefix = wanted or present[0]
    if prefix not in present:
        raise UserError(f"--dataset {prefix}: no {prefix}_train0.csv in {folder}{closest(prefix, present)}")
    return prefix


def _class_names(config: Config, record: dict, tables: list[Rows], folder: Path) -> list[str]:
    """dataset.json's names, else as many labels as all CSVs have, whichever of them run; --num_classes may add outputs."""
    names = list(record.get("class_names") or [])
    if not names:
        names = [str(label) for label in range(1 + max(label for rows in tables for _, label in rows))]
    if config.num_classes is not None:
        if config.num_classes < len(names):
            raise UserError(f"--num_classes {config.num_classes}: the data set in {folder} has {len(names)} classes")
        if config.num_classes > MOST_CLASSES:
            raise UserError(f"--num_classes {config.num_classes}: give at most {MOST_CLASSES}")
        names += [str(label) for label in range(len(names), config.num_classes)]
    return names


def _check_labels(folder: Path, prefix: str, tables: Tables, names: list[str]) -> None:
    """Raises UserError for an unknown label, a path that leaves the image root, an image of train and test both."""
    label_of: dict[str, int] = {}
    kind_of: dict[str, str] = {}
    for (kind, task), rows in tables.items():
        file = folder / csv_name(prefix, kind, task)
        for image, label in rows:
            if label >= len(names):
                raise UserError(
                    f"{file}: {short(image)} has the label {label}, unknown among {len(names)} classes (dataset.json)"
                )
            if leaves_root(image):
                raise UserError(f"{file}: {short(image)!r} leaves the image root; give paths relative to it")
            if label_of.setdefault(image, label) != label:
                raise UserError(f"{file}: {short(image)} has the label {label}, elsewhere {label_of[image]}")
            if kind_of.setdefault(image, kind) != kind:
                raise UserError(f"{file}: {short(image)} is in training and test CSVs both")


def data_key(data: DataSet) -> list[str]:
    """Two hashes: one of the images' names, the labels and the tasks, one of the replay CSVs, which task 0 does not need."""
    tasks = (
        data.class_names,
        data.train.paths,
        data.train.labels.tolist(),
        data.new_rows,
        data.test.paths,
        data.test_rows,
    )
    return [hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in (tasks, data.replay_csv)]
