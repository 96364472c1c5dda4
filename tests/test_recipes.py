"""The recipes in lifequant/presets: each is a grid with a time, and its run of `ours` in small."""

from __future__ import annotations

import pytest
from support.tiny import CLASSES, write_images

from lifequant import presets
from lifequant.common.arguments import run_main
from lifequant.experiments.grid import read_grid, runs_of_grid
from lifequant.experiments.grid_tasks import write_tasks
from lifequant.experiments.sweep import main as sweep
from lifequant.options import make
from lifequant.train import run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each recipe, its images in small: 10 of each of two classes a task or domain."""
    found = {}
    for name, file in presets.recipes().items():
        root, tasks = tmp_path_factory.mktemp(name), read_grid(file)["tasks"]
        if domains := tasks.get("domains"):
            for domain in domains:
                write_images(root / domain, CLASSES[:2], train=10, test=2)
        else:
            write_images(root, [*CLASSES, "gnu", "hen", "ibis", "jay"], train=10, test=2)
        found[name] = root
    return found


@pytest.mark.parametrize("name", presets.recipes())
def test_dry_run(name, folders, tmp_path, capsys):
    """Every run of a recipe is one that can be made; the time is said, and nothing is written."""
    assert run_main(sweep, [name, "--data_dir", str(folders[name]), "--out", str(tmp_path / "out"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.count("to run ") == len(runs_of_grid(read_grid(presets.recipes()[name]), tmp_path, name, {}))
    assert " at a time: about " in out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", presets.recipes())
def test_in_small(name, folders, tmp_path):
    """`ours` at 4 bits with the recipe's settings, but two tasks, one epoch, 32 pixels, and random weights."""
    runs = runs_of_grid(read_grid(presets.recipes()[name]), tmp_path, name, {})
    one = next(r for r in runs if r.flags["method"] == "ours" and r.flags["bitW"] == 4)
    write_tasks(one.tasks, 0, folders[name], one.csv_dir)
    small = {
        "num_epochs": 1,
        "num_tasks": 2,
        "image_size": 32,
        "stem": None,
        "source_weights": None,
        "device": "cpu",
        "compile": "off",
    }
    if one.flags["target_model"].startswith("resnet"):
        small["stem"] = "imagenet"  # the small stem takes four times as long
    flags = one.flags | small | {"csv_dir": one.csv_dir, "data_dir": folders[name], "job_dir": tmp_path / "run"}
    found = run(make(**flags))
    assert len(found["top1"]) == 2 and found["config"]["target_model"] == one.flags["target_model"]
    assert all(entry["codes"] <= 2 ** entry["bits"] for entry in found["max_codes_per_tensor"].values())


def test_unknown(tmp_path, capsys):
    assert run_main(sweep, ["office31_resnet5", "--data_dir", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "no recipe of that name; did you mean 'office31_resnet50'?" in capsys.readouterr().err
