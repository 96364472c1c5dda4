"""The replay CSVs, which name the images that are stored of each task."""

from __future__ import annotations

from pathlib import Path

from lifequant.common.errors import UserError
from lifequant.common.safe_files import short
from lifequant.config import Config
from lifequant.data.same_images import Spellings
from lifequant.data.task_csv import Rows, csv_name, read_rows, task_numbers


def read_replay_csvs(
    config: Config, folder: Path, prefix: str, ids: list[int], every: dict[int, Rows], spellings: Spellings, say
) -> list[list[str]] | None:
    """The images that the replay CSVs name; None where there are none, or where a flag asks for another sample."""
    present = task_numbers(folder, prefix, "replay")
    if config.replay_rate == 0 or not set(ids) <= set(present):
        return None
    flags = ("replay_rate", "buffer_size", "replay_selection", "memory_budget")
    if others := [f"--{name}" for name in flags if getattr(config, name) not in (None, "random")]:
        say(f"the replay CSVs in {folder} are not used: {' and '.join(others)} says what is stored")
        return None
    replay = []
    for task in ids:
        file = folder / csv_name(prefix, "replay", task)
        own = dict(every[task])
        for image, label in (rows := read_rows(file)):
            if own.get(spellings.of(image)) != label:
                raise UserError(
                    f"{file}: {short(image)} is not in {csv_name(prefix, 'train', task)} with the label {label}"
                )
        replay.append(list(dict.fromkeys(spellings.of(image) for image, _ in rows)))
    say(f"replay: the images that the replay CSVs in {folder} name")
    return replay
