"""Folders of empty placeholder images, the task CSVs made from them, and how to read these."""

import csv

from lifequant.common.arguments import run_main
from lifequant.data.create.tasks import main_tasks


def fill(root, classes, **sides):
    """Empty images train/<class>/0001.png, ...; ``sides`` gives images a class: fill(root, "ab", train=3, test=1)."""
    for side, count in sides.items():
        for name in classes:
            folder = root / side / name
            folder.mkdir(parents=True)
            for number in range(1, count + 1):
                (folder / f"{number:04d}.png").touch()
    return root


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["image", "label"]
    return [(image, int(label)) for image, label in lines]


def generate(data, source="train", **flags):
    """Exit code of lifeLongDataGeneator.py; a flag given as None is left out."""
    settings = {"data_dir": data, "output_csv": "x.csv", "num_tasks": 3, "diminish_rate": 25, "source": source, **flags}
    return run_main(main_tasks, [f"--{flag}={value}" for flag, value in settings.items() if value is not None])
