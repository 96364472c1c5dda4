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
from lifequant.data.create.tasks import checked_tasks, csv_files, domain_images, folder_images, rows_of_tasks
from lifequant.data.split import lowest
from lifequant.data.task_csv import Rows

TASKS: dict[str, tuple[type, ...]] = {
    "dataset": (str,),
    "num_tasks": (int,),
    "diminish_rate": (int, float),
    "images_per_class": (int,),
    "held_out": (float,),
    "task_seed": (int, str),
    "domains": (list,),
}
OF_CLASSES = ("num_tasks", "diminish_rate")  # what domains take the place of
OF_THE_RUN = "seed"  # the task_seed of tasks that are made with the run's own seed


def check(tasks: dict[str, Any], path: Path) -> None:
    """Raises UserError for what is missing in [tasks], unknown, or of another type."""
    domains = tasks.get("domains")
    required = ("dataset", "domains") if domains is not None else ("dataset", *OF_CLASSES)
    for name, types in TASKS.items():
        if not isinstance(tasks.get(name), types if name in required else (*types, type(None))):
            what = {(str,): "a name", (list,): "a list of folders"}.get(types, "a number")
            raise UserError(f"{path}: [tasks] needs {name}, {what}")
    if domains is not None:
        if not domains or not all(isinstance(domain, str) for domain in domains):
            raise UserError(f"{path}: [tasks] needs domains, a list of folders")
        if given := [name for name in OF_CLASSES if name in tasks]:
            raise UserError(f"{path}: [tasks] has domains and {given[0]}: each domain is one task, with all classes")
    else:
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


def number(tasks: dict[str, Any]) -> int:
    """How many tasks there are."""
    return len(tasks["domains"]) if tasks.get("domains") else tasks["num_tasks"]


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
    seen, domains, n = Seen(), tasks.get("domains"), tasks.get("images_per_class")

    def read(source: str) -> tuple[list[str], list[Rows]]:
        """The class names, and the images of each domain or of the one folder."""
        if domains:
            return domain_images(data_dir, domains, source, seed, seen)
        names, rows = folder_images(data_dir, data_dir, source, seen)
        return names, [rows]

    names, pools = read("train")
    if n:
        pools = [pick(rows, n, seed, "thin") for rows in pools]
    if tasks.get("held_out"):  # no test image is read
        held = set().union(*(pick(rows, round(n * tasks["held_out"]), seed, "held_out") for rows in pools))
        tests = [[row for row in rows if row in held] for rows in pools]
        pools = [[row for row in rows if row not in held] for rows in pools]
    else:
        _, tests = read("test")
    classes = [list(range(len(names)))] * len(pools) if domains else classes_of_tasks(tasks, len(names), seed)
    files: dict[str, str] = {}
    for side, of_side in (("train", pools), ("test", tests)):
        files |= csv_files(tasks["dataset"], side, of_side if domains else rows_of_tasks(of_side[0], classes))
    if seen.linked or domains:  # the runs must know where links may lead, and the domains' names
        record = dataset_json.record(tasks["dataset"], names, classes, data_dir, seed, None, domains)
        linked = {"linked": seen.outside()} if seen.linked else {}
        files[dataset_json.FILE] = dataset_json.text({**record, **linked})
    write_all({folder / name: text for name, text in files.items()})


def pick(rows: Rows, n: int, seed: int, purpose: str) -> Rows:
    """``n`` images of each class, the same ones for a seed."""
    labels = [label for _, label in rows]
    return [rows[i] for i in lowest([image for image, _ in rows], labels, dict.fromkeys(labels, n), seed, purpose)]
