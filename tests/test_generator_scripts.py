"""The scripts as they lie in lifelong_data_generation/, and the CSVs that one of them shipped."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
from support.placeholders import fill, generate

TOP = Path(__file__).resolve().parents[1]
SCRIPTS = TOP / "lifelong_data_generation"


def test_shipped_csvs(tmp_path, monkeypatch):
    """The shipped files are what the generator writes (compared with fewer images a class, made as placeholders)."""
    shipped = runpy.run_path(str(SCRIPTS / "make_shipped_csvs.py"))["shipped"]
    for name, content in shipped().items():
        assert (TOP / "resnet-20-cifar-10" / "data" / name).read_text() == content, name
    monkeypatch.chdir(tmp_path)
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    data = fill(tmp_path / "images", classes, train=3, test=2)
    assert generate(data, output_csv="cifar10.csv") == 0 and generate(data, "test", output_csv="cifar10.csv") == 0
    written = {path.name: path.read_text() for path in Path("cifar10_025").iterdir()}
    root = json.dumps(str(data.resolve()))
    written["dataset.json"] = written["dataset.json"].replace(root, "null")
    assert written == shipped(3, 2)


def test_scripts_from_elsewhere(tmp_path, monkeypatch):
    """Both spellings, from another folder, by a Python that does not see an editable installation (-S)."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "images", "abcdefghij", train=2)
    environment = {**os.environ, "PYTHONPATH": str(Path(np.__file__).parents[1])}

    def run(script, *arguments):
        command = [sys.executable, "-S", str(SCRIPTS / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    settings = ["--output_csv", "x.csv", "--num_tasks", "3", "--diminish_rate", "25", "--source", "train"]
    done = run("lifeLongDataGeneator.py", "--data_dir", "images", *settings)
    assert done.returncode == 0, done.stderr
    done = run("replayDataGenerator.py", "--data_dir", "x_025")
    assert done.returncode == 0 and Path("x_025/x_replay2.csv").is_file(), done.stderr
    done = run("replayDataGeneator.py", "--data_dri=.")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "--data_dir" in done.stderr
