"""The folder of the images that task CSVs name, and the check that all of them are in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lifequant.common.commands import prepare_command
from lifequant.common.errors import UserError
from lifequant.common.files import TOP, find_folder
from lifequant.common.safe_files import short, stats_inside
from lifequant.config import Config
from lifequant.data import dataset_json


def image_root(config: Config, record: dataset_json.Record, folder: Path, prefix: str) -> Path:
    """The folder that the images' paths are relative to: --data_dir, else dataset.json's, else the usual one.

    ``folder`` has the task CSVs. Raises UserError if the images' folder is missing.
    """
    if config.data_dir is not None:
        return find_folder(
            config.data_dir, "--data_dir", f"make the images: {prepare_command(prefix, config.data_dir)}"
        )
    if record.get("image_root"):
        root = Path(record["image_root"]).expanduser()
        if not os.path.isdir(root):  # False too where the name is longer than any may be
            raise UserError(
                f"{folder / dataset_json.FILE} says the images are in {short(root)}, which is not there: name the folder by --data_dir"
            )
        return root
    return (TOP or Path.cwd()) / "data_dir" / prefix


def checked_images(root: Path, paths: list[str], prefix: str, linked: Sequence[str] = ()) -> dict[str, os.stat_result]:
    """The size and time of each image. Raises UserError if one is missing or lies outside ``root`` and the folders ``linked``."""
    stats = dict(zip(paths, stats_inside(root, paths, linked), strict=True))
    missing = [path for path in paths if stats[path] is None]
    if missing:
        command = prepare_command(prefix, str(root))
        raise UserError(
            f"{len(missing)} of {len(paths)} images are missing in {root} (first: {short(missing[0])}): name their folder by --data_dir, "
            f"or make them: {command}"
        )
    return stats
