"""[tasks] of a grid: its check, the seed of the tasks, and their CSVs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lifequant.common.arguments import share
from lifequant.common.errors import UserError, closest
from lifequant.common.files import write_all
from lifequant.data import dataset_json
from lifequant.data.create.class_folders import Seen
from lifequant.data.create.tasks import checked_tasks, csv_files, folder_images, rows_of_tasks
from lifequant.data.split import lowest
from lifequant.data.task_csv import Rows

TASKS: dict[str, tuple[type, ...]] = {
    "dataset": (str,),
    "num_tasks": (int,),
    "diminish_rate": (int, float),
    "images_per_class": (int,),
    "held_out": (float,),
    "task_seed": (int, str),
}
REQUIRED = ("dataset", "num_tasks", "diminish_rate")
OF_THE_RUN = "seed"  # the task_seed of tasks that are made with the run's own seed


def check(tasks: dict[str, Any], path: Path) -> None:
    """Raises UserError for what is missing in [tasks], unknown, or of another type."""
    for name, types in TASKS.items():
        if not isinstance(tasks.get(name), types if name in REQUIRED else (*types, type(None))):
            raise UserError(f"{path}: [tasks] needs {name}, a {'name' if types == (str,) else 'number'}")
    try:
        share(str(tasks["diminish_rate"]))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{path}: [tasks] diminish_rate: {error}") from None
    if unknown := sorted(set(tasks) - set(TASKS)):
        raise UserError(
            f"{path}: [tasks] has {unknown[0]!r}{closest(unknown[0], list(TASKS))} (known: {', '.join(TASKS)})"
        )
    if tasks.get("held_out") and not tasks.get("images_per_class"):
        raise UserError(f"{path}: [tasks] has held_out, a share of images_per_class, which is missing")
    seed = tasks.get("task_seed", 0)
    if seed != OF_THE_RUN and (type(seed) is not int or seed < 0):
        raise UserError(
            f'{path}: [tasks] task_seed = {json.dumps(seed)}: give a number, or "{OF_THE_RUN}" for the seed of each run'
        )


def task_seed(tasks: dict[str, Any], seed: int) -> int:
    """The seed of the class order and of the choice of images, for a run with ``seed``."""
    found = tasks.get("task_seed", 0)
    return seed if found == OF_THE_RUN else found


def without_seed(tasks: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tasks.items() if name != "task_seed"}


def classes_of_tasks(tasks: dict[str, Any], classes: int, seed: int) -> list[list[int]]:
    """The labels of each task. Raises UserError."""
    return checked_tasks(classes, tasks["num_tasks"], share(str(tasks["diminish_rate"])), seed)


def write_tasks(tasks: dict[str, Any], seed: int, data_dir: Path, folder: Path) -> None:
    """Write the task CSVs into ``folder``. Raises UserError."""
    seen = Seen()
    names, rows = folder_images(data_dir, data_dir, "train", seen)
    if tasks.get("images_per_class"):
        rows = pick(rows, tasks["images_per_class"], seed, "thin")
    if tasks.get("held_out"):  # no test image is read
        held = set(pick(rows, round(tasks["images_per_class"] * tasks["held_out"]), seed, "held_out"))
        rows, test = [row for row in rows if row not in held], [row for row in rows if row in held]
    else:
        _, test = folder_images(data_dir, data_dir, "test", seen)
    classes = classes_of_tasks(tasks, len(names), seed)
    files: dict[str, str] = {}
    for side, of_side in (("train", rows), ("test", test)):
        files |= csv_files(tasks["dataset"], side, rows_of_tasks(of_side, classes))
    if seen.linked:  # the runs must know where links may lead
        record = dataset_json.record(tasks["dataset"], names, classes, data_dir, seed, None)
        files[dataset_json.FILE] = dataset_json.text({**record, "linked": seen.outside()})
    write_all({folder / name: text for name, text in files.items()})


def pick(rows: Rows, n: int, seed: int, purpose: str) -> Rows:
    """``n`` images of each class, the same ones for a seed."""
    labels = [label for _, label in rows]
    return [rows[i] for i in lowest([image for image, _ in rows], labels, dict.fromkeys(labels, n), seed, purpose)]
