"""dataset.json, beside the task CSVs: what they were made from. Informative: training works without it.

Keys: schema, name (the CSVs' prefix), class_names (sorted; a label is a place in it), image_root (absolute, or null if
unknown), num_tasks, diminish_rate (share, null for domains), seed, lt_gamma and images_per_class (of the training
CSVs), domains (or null), tasks ([{"classes": [labels]}]), counts ({"train", "test", "replay": [images of each task]}).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import UserError

FILE = "dataset.json"
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
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):  # broken JSON, or not UTF-8
        raise UserError(f"{path}: not readable as JSON: move it away, or choose another folder") from None
    if not isinstance(found, dict) or found.get("schema") != 1 or not isinstance(found.get("counts"), dict):
        raise UserError(f"{path}: not a description of task CSVs (schema 1): move it away, or choose another folder")
    return found


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
    return f" ({old}, now {new})" if isinstance(old, int | float | str) and isinstance(new, int | float | str) else ""
