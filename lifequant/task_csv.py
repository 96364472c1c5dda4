"""Task CSVs: how they are named, written, found and read.

``<prefix>_train.csv`` has each training image once, ``<prefix>_train0.csv``, ``<prefix>_train1.csv``, ... those of each
task; ``test`` and ``replay`` (no file over all tasks) likewise. Columns: image (path relative to the data folder, with
/), label (the class's place among the sorted class names).
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path

from .errors import UserError, closest

Rows = list[tuple[str, int]]  # (image, label)

_NAME = re.compile(r"(?P<prefix>.+)_(?P<source>train|test|replay)(?P<task>0|[1-9][0-9]*)?\.csv")


def csv_name(prefix: str, source: str, task: int | None = None) -> str:
    """File name of a task's CSV, or (``task`` None) of the one over all tasks."""
    return f"{prefix}_{source}{'' if task is None else task}.csv"


def csv_text(rows: Rows) -> str:
    """The content of a CSV, header first."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([("image", "label"), *rows])
    return out.getvalue()


def prefixes(folder: Path) -> list[str]:
    """The data sets whose training CSVs of tasks lie in ``folder``."""
    matches = [_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted({m["prefix"] for m in matches if m and m["source"] == "train" and m["task"]})


def choose_prefix(folder: Path, wanted: str | None) -> str:
    """The prefix ``wanted`` (also as cifar100.csv, cifar100_train.csv), else the only one present; raises UserError."""
    present = prefixes(folder)
    if not present:
        raise UserError(
            f"{folder}: no training CSVs of tasks (<name>_train0.csv, ...); lifeLongDataGeneator.py makes them"
        )
    if wanted is None:
        if len(present) > 1:
            raise UserError(f"{folder}: CSVs of several data sets ({', '.join(present)}); say which by --data_csv")
        return present[0]
    stem = wanted.removesuffix(".csv")
    for name in (stem, re.sub(r"_(train|test|replay)[0-9]*$", "", stem)):
        if name in present:
            return name
    raise UserError(f"{folder}: no {stem}_train0.csv (present: {', '.join(present)}){closest(stem, present)}")


def task_numbers(folder: Path, prefix: str, source: str) -> list[int]:
    """The tasks of which ``folder`` has a CSV, ascending."""
    matches = [_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted(int(m["task"]) for m in matches if m and m["task"] and (m["prefix"], m["source"]) == (prefix, source))


def choose_tasks(folder: Path, prefix: str, num_tasks: int | None) -> int:
    """``num_tasks``, or as many as there are training CSVs of tasks; raises UserError where one is missing."""
    present = task_numbers(folder, prefix, "train")
    wanted = num_tasks or present[-1] + 1
    missing = sorted(set(range(wanted)) - set(present))
    if missing:
        raise UserError(f"{folder}: {csv_name(prefix, 'train', missing[0])} is missing ({wanted} tasks asked for)")
    return wanted


def read_rows(path: Path) -> Rows:
    """A CSV's rows. Raises UserError, naming file and row, for what a CSV of images and labels can't hold."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV ({error})") from None
    header = lines[0] if lines else []
    for column in ("image", "label"):
        if column not in header:
            raise UserError(f"{path}: no column '{column}' (columns: {', '.join(header) or 'none'})")
    image, label = header.index("image"), header.index("label")
    rows: Rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:  # an empty line, which many editors leave at the end
            continue
        if len(line) != len(header):
            raise UserError(f"{path}, row {number}: {len(line)} values where the header has {len(header)} columns")
        if not (line[label].isascii() and line[label].isdigit() and len(line[label]) <= 9):
            raise UserError(f"{path}, row {number}: the label {line[label]!r} is not a whole number of at least 0")
        if not line[image]:
            raise UserError(f"{path}, row {number}: no image")
        rows.append((line[image], int(line[label])))
    if not rows:
        raise UserError(f"{path}: no images")
    twice = [image for image, n in Counter(image for image, _ in rows).items() if n > 1]
    if twice:
        raise UserError(f"{path}: {twice[0]} is there more than once")
    return rows
