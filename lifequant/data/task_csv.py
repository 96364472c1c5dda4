"""Naming, writing, finding and reading task CSVs.

``<prefix>_train.csv`` has each training image once, ``<prefix>_train0.csv``, ``<prefix>_train1.csv``, ... those of each
task; ``test`` and ``replay`` (no file over all tasks) likewise. Columns: image (path relative to the data folder, with
/), label (the class's index among the sorted class names). CSVs of other programs may have more columns, other separators
(; and tab) and quotes, and blanks around names and labels.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lifequant.common.commands import command
from lifequant.common.errors import UserError, closest
from lifequant.common.safe_files import MOST_CLASSES, open_regular, short

Rows = list[tuple[str, int]]  # (image, label)

_NAME = re.compile(r"(?P<prefix>.+)_(?P<source>train|test|replay)(?P<task>0|[1-9][0-9]{0,5})?\.csv")
_MOST_BYTES = 2**30  # of a CSV; ImageNet-21k's has 0.6 GB
_MOST_ROWS = 20_000_000  # which take 3 GB of memory
_MOST_ROW = 2**20  # characters of a row, line breaks in quotes included: 10,000 columns are fine, an endless line isn't
_LONGEST_PATH = 4096  # characters; no system takes longer ones
_OUTSIDE = re.compile(r"[/\\]|.:|(.*[/\\])?\.\.([/\\]|$)|.*\0", re.DOTALL)


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
        raise UserError(f"{folder}: no training CSVs of tasks (<name>_train0.csv, ...); make them: {command('tasks')}")
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
    missing = next((task for task in range(wanted) if task not in present), None)  # at the first, however many
    if missing is not None:
        raise UserError(f"{folder}: {csv_name(prefix, 'train', missing)} is missing ({wanted} tasks asked for)")
    return wanted


def leaves_root(image: str) -> bool:
    """Whether a path is absolute (on any system), climbs by ``..`` or holds a NUL."""
    return _OUTSIDE.match(image) is not None


class _Lines:
    """A text file's lines for csv.reader. It stops at a long row: csv.reader would hold a row of any length in memory."""

    def __init__(self, file: io.TextIOBase) -> None:
        self.file, self.left = file, _MOST_ROW

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(_MOST_ROW + 1)
        self.left -= len(line)
        if self.left < 0:
            raise csv.Error(f"a row of more than {_MOST_ROW} characters")
        if not line:
            raise StopIteration
        return line


def _rows_of_text(path: Path) -> Iterator[list[str]]:
    """Each row's values, separated and quoted as the header is. Raises UserError."""
    try:
        with open_regular(path, _MOST_BYTES) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
            begin, header = 0, file.readline(_MOST_ROW)
            while header and (not header.strip() or header.startswith("sep=")):  # sep=; is what Excel is told by
                yield []
                begin, header = file.tell(), file.readline(_MOST_ROW)
            style = _style(header)
            file.seek(begin)
            lines = _Lines(file)
            for row in csv.reader(lines, strict=True, **style):
                lines.left = _MOST_ROW
                yield row
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text: save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV ({error})") from None


def _style(header: str) -> dict[str, Any]:
    """What csv.reader must know of a CSV with this first line; commas and double quotes where it has no known columns."""
    for delimiter, quote in itertools.product(",;\t", "\"'"):
        style = {"delimiter": delimiter, "quotechar": quote, "skipinitialspace": delimiter + " " in header}
        with contextlib.suppress(csv.Error, StopIteration):
            columns = _columns(next(csv.reader([header], **style)))
            if "image" in columns and "label" in columns:
                return style
    return {}


def _columns(header: list[str]) -> list[str]:
    """The names of the columns, without blanks, byte order marks of files that were joined, and capitals."""
    if "image" in header and "label" in header:
        return header
    names = [name.strip("\ufeff \t") for name in header]
    return names if "image" in names and "label" in names else [name.lower() for name in names]


def _label(text: str) -> str:
    """A label as it is meant: blanks and quotes around it are no part of it, and pandas writes 3 as 3.0 in a column with gaps."""
    return re.sub(r"\.0+$", "", text.strip(" \t\"'"))


def _no_column(path: Path, header: list[str], column: str) -> UserError:
    shown = short(", ".join(header)) or "none"
    if len(header) > 1 and any(map(_is_label, header)):
        return UserError(
            f"{path}: no column '{column}', for its first row is no header ({shown}): write image,label above"
        )
    return UserError(f"{path}: no column '{column}' (columns: {shown})")


def _is_label(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def plain(image: str) -> str:
    """``image`` without what says nothing: ``./``, ``/./``, ``//``."""
    if "//" not in image and "./" not in image:
        return image
    return "/".join(part for part in image.split("/") if part not in ("", "."))


def read_rows(path: Path) -> Rows:
    """A CSV's rows. Raises UserError that names file and row for anything that is no image with its label.

    Python's csv reads row by row. pandas would first hold a hostile row whole, at ten times its bytes.
    """
    lines = _rows_of_text(path)
    top, header = next(((number, line) for number, line in enumerate(lines, start=1) if line), (1, []))
    columns = _columns(header)
    for column in ("image", "label"):
        if column not in columns:
            raise _no_column(path, header, column)
    image, label = columns.index("image"), columns.index("label")
    rows: Rows = []
    for number, line in enumerate(lines, start=top + 1):
        if not line:  # an empty line, which many editors leave at the end
            continue
        if len(line) != len(header):
            if len(line) < len(header) or any(line[len(header) :]):
                raise _other_length(path, number, line, header)
            line = line[: len(header)]  # commas at the end
        text = line[label]
        if not _is_label(text) and not _is_label(text := _label(text)):
            shown = repr(short(line[label]))
            raise UserError(f"{path}, row {number}: the label {shown} is not a whole number of at least 0")
        if (value := int(text)) >= MOST_CLASSES:
            raise UserError(
                f"{path}, row {number}: the label {value} is above {MOST_CLASSES - 1}: labels count the classes from 0"
            )
        if not line[image]:
            raise UserError(f"{path}, row {number}: no image")
        if len(line[image]) > _LONGEST_PATH:
            raise UserError(
                f"{path}, row {number}: a path of {len(line[image])} characters: give at most {_LONGEST_PATH}"
            )
        if len(rows) == _MOST_ROWS:
            raise UserError(f"{path}: more than {_MOST_ROWS} rows: split it into tasks")
        rows.append((line[image], value))
    if not rows:
        raise UserError(f"{path}: no images")
    if len({plain(image) for image, _ in rows}) < len(rows):
        twice = Counter(plain(image) for image, _ in rows).most_common(1)[0][0]
        raise UserError(f"{path}: {short(twice)} is there more than once")
    return rows


def _other_length(path: Path, number: int, line: list[str], header: list[str]) -> UserError:
    index = len(line) == len(header) + 1 and line[0].isdigit()
    why = ": its index column has no name: write it without (row.names=FALSE in R)" if index else ""
    return UserError(f"{path}, row {number}: {len(line)} values where the header has {len(header)} columns{why}")
