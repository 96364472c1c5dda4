"""dataset.json, beside the task CSVs: what they were made from. Informative: training works without it.

Keys: schema, name (the CSVs' prefix), class_names (sorted; a label is an index into it), image_root (absolute, or null if
unknown), num_tasks, diminish_rate (share, null for domains), seed, lt_gamma and images_per_class (of the training
CSVs), domains (or null), tasks ([{"classes": [labels]}]), counts ({"train", "test", "replay": [images of each task]}),
linked (only where links in the image root lead out of it: the folders, absolute, where runs may read too).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

from lifequant.common.errors import UserError
from lifequant.common.safe_files import MOST_CLASSES, read_text, short

FILE = "dataset.json"
_MOST_BYTES = 2**25  # a long name for each of MOST_CLASSES classes
_BAD = ("Cc", "Cs", "Zl", "Zp")  # as files.checked_name: control characters, half characters, line breaks
Record = dict[str, Any]

# What the training and the test CSVs of one data set must agree in, and how a person calls it.
_SHARED = {
    "seed": "seed",
    "diminish_rate": "diminish_rate",
    "num_tasks": "number of tasks",
    "domains": "domains",
    "class_names": "classes",
    "tasks": "split of classes",
    "image_root": "image folder",
}


def record(
    name: str,
    class_names: list[str],
    tasks: list[list[int]],
    root: Path | None,
    seed: int,
    rate: float | None,
    domains: list[str] | None = None,
) -> Record:
    """A new record, without counts; its training images are neither thinned nor long-tailed."""
    return {
        "schema": 1,
        "name": name,
        "class_names": class_names,
        "image_root": None if root is None else str(root),
        "num_tasks": len(tasks),
        "diminish_rate": rate,
        "seed": seed,
        "lt_gamma": 1.0,
        "images_per_class": None,
        "domains": domains,
        "tasks": [{"classes": labels} for labels in tasks],
        "counts": {},
    }


def read(folder: Path) -> Record | None:
    """The record in ``folder``, None where there is none. Raises UserError for a file that isn't a record."""
    path = folder / FILE
    try:
        found = json.loads(read_text(path, _MOST_BYTES), parse_constant=_refuse)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # broken JSON, NaN, not UTF-8, nested without end
        raise UserError(f"{path}: not readable as JSON: move it away, or choose another folder") from None
    if not isinstance(found, dict) or found.get("schema") != 1 or not isinstance(found.get("counts"), dict):
        raise UserError(f"{path}: not a description of task CSVs (schema 1): move it away, or choose another folder")
    for key, (is_valid, wanted) in _CONTENT.items():
        if found.get(key) is not None and not is_valid(found[key]):
            raise UserError(f"{path}: {key} is not {wanted}: make the task CSVs again, or move the file away")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most  # NaN fails


def _is_name(value: object, longest: int = 255) -> bool:
    """Whether it can name a folder and stand on a terminal."""
    return isinstance(value, str) and len(value) <= longest and not any(category(c) in _BAD for c in value)


def _are_names(value: object) -> bool:
    """Different names, not too many of them."""
    return isinstance(value, list) and len(value) <= MOST_CLASSES and all(map(_is_name, value)) and (
        len(set(value)) == len(value)
    )  # fmt: skip


def _are_folders(value: object) -> bool:
    return isinstance(value, list) and all(_is_name(folder, 4096) and os.path.isabs(folder) for folder in value)


def _are_tasks(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(task, dict) and isinstance(task.get("classes"), list) and all(map(_is_whole, task["classes"]))
        for task in value
    )


def _are_counts(value: dict) -> bool:
    return all(isinstance(numbers, list) and all(map(_is_whole, numbers)) for numbers in value.values())


# What each key must hold, where it is there and not null, and how a person calls it.
_CONTENT = {
    "name": (_is_name, "a text of one line"),
    "class_names": (_are_names, f"a list of at most {MOST_CLASSES} different names"),
    "image_root": (lambda value: _is_name(value, 4096), "a folder's name"),
    "num_tasks": (_is_whole, "a whole number"),
    "diminish_rate": (lambda value: _is_number(value, 0, 1), "a share of 0 to 1"),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "lt_gamma": (lambda value: _is_number(value, 1, 1e9), "a number of at least 1"),
    "images_per_class": (_is_whole, "a whole number"),
    "domains": (_are_names, "a list of different names"),
    "tasks": (_are_tasks, 'a list of {"classes": [labels]}'),
    "counts": (_are_counts, "lists of whole numbers"),
    "linked": (_are_folders, "a list of folders' names"),
}


def merged(folder: Path, new: Record, source: str) -> Record:
    """``new``, just made for ``source``, with what still holds of the other sources in the record in ``folder``.

    A training run with other settings replaces the record; a test run must agree with it. Raises UserError where it
    does not, and where the record is another data set's.
    """
    old = read(folder)
    if old is None:
        return new
    if old.get("name") != new["name"]:
        raise UserError(
            f"{folder / FILE} is of another data set ({old.get('name')}): choose another folder by --output_dir"
        )
    linked = sorted({*new.get("linked", []), *(old.get("linked") or [])})
    if linked and old.get("image_root") == new["image_root"]:
        new = {**new, "linked": linked}
    differ = [key for key in _SHARED if old.get(key) != new[key]]
    if old.get("image_root") is None and "image_root" in differ:
        differ.remove("image_root")
    counts = old["counts"]
    if source == "test" and "train" in counts:
        if differ:
            both = _both(old.get(differ[0]), new[differ[0]])
            raise UserError(
                f"the training CSVs in {folder} have another {_SHARED[differ[0]]}{both}: "
                "use the same for train and test, or another --output_dir"
            )
        thinned = {key: old.get(key) for key in ("lt_gamma", "images_per_class")}
        return {**new, **thinned, "counts": {**counts, **new["counts"]}}
    kept = {}
    if "test" in counts and not differ:
        kept["test"] = counts["test"]
    same_images = all(old.get(key) == new[key] for key in ("lt_gamma", "images_per_class"))
    if "replay" in counts and not differ and same_images and counts.get("train") == new["counts"].get("train"):
        kept["replay"] = counts["replay"]
    return {**new, "counts": {**kept, **new["counts"]}}


def domains_of(record: Record, ids: Sequence[int]) -> list[str] | None:
    """The domains' names of the tasks ``ids``; None where tasks are no domains."""
    domains = record.get("domains") or []
    return [domains[task] for task in ids] if max(ids) < len(domains) else None


def text(content: Record) -> str:
    """The file's content: one key a line, the counts in a fixed order."""
    counts = {
        source: content["counts"][source] for source in ("train", "test", "replay") if source in content["counts"]
    }
    lines = [
        f' "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in {**content, "counts": counts}.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _both(old: object, new: object) -> str:
    """The two values, where they are short enough to read."""
    return (
        f" ({short(old)}, now {short(new)})"
        if isinstance(old, int | float | str) and isinstance(new, int | float | str)
        else ""
    )
