"""Commands in messages are called as this program was called."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lifequant
from lifequant.common import commands, files


@pytest.mark.parametrize(
    ("called", "tasks", "train"),
    [
        ("/venv/bin/lifequant", "lifequant tasks", "lifequant --lr 1 --resume"),
        ("lifequant replay", "lifequant tasks", "lifequant --lr 1 --resume"),
        (
            str(files.TOP / "resnet-20-cifar-10" / "main.py"),
            "python {scripts}/lifeLongDataGeneator.py",
            "python3 {called} --lr 1 --resume",
        ),
        ("/elsewhere/my_own.py", "lifequant tasks", "python3 {called} --lr 1 --resume"),
    ],
)
def test_as_this_program_was_called(called, tasks, train, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [called, "--lr", "1"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", called, "--lr", "1"])
    monkeypatch.chdir(files.TOP)
    assert commands.command("tasks") == tasks.format(scripts="lifelong_data_generation")
    assert commands.going_on(["--lr", "1"]) == train.format(called=called)


def test_going_on(monkeypatch):
    """Quoted for a shell, --resume once, --reset never; by torchrun where torchrun has begun it."""
    monkeypatch.setattr(sys, "argv", ["lifequant"])
    typed = ["train", "--job_dir", "my runs/a", "--reset", "True", "--resume=x.pt", "--resume", "--nme", "--reset"]
    words = shlex.split(commands.going_on(typed))
    assert words == ["lifequant", "--job_dir", "my runs/a", "--nme", "--resume"]
    monkeypatch.setattr(sys, "argv", ["main.py"])
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert commands.going_on(["--nme"]) == "torchrun --nproc_per_node 2 main.py --nme --resume"


IN_A_WHEEL = """
import sys
from lifequant.__main__ import main
tasks = "tasks --data_dir nowhere --output_csv cifar10.csv --source train --num_tasks 2 --diminish_rate 25"
for line in (tasks, "--csv_dir nowhere", "--csv_dir .", "replay --data_dir .", "counts --data_dir nowhere"):
    sys.argv[0] = "/venv/bin/lifequant"
    assert main(line.split()) == 2
"""


def test_an_installed_wheel_names_verbs(tmp_path):
    """Without a clone around the package, no message names a script."""
    shutil.copytree(Path(lifequant.__file__).parent, tmp_path / "lifequant")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_WHEEL], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100
    )
    lines = done.stderr.splitlines()
    ends = ["lifequant images --dataset cifar10 --out nowhere", *["lifequant tasks"] * 4]
    assert done.returncode == 0 and [line.endswith(end) for line, end in zip(lines, ends, strict=True)] == [True] * 5
    assert ".py" not in done.stderr
