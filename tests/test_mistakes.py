"""Every session of tests/support/mistakes.md answers what stands there, in one line, with exit code 2; and faults of our own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import mistakes
from support.tiny import arguments, settings, train

BLOCKS = mistakes.blocks()


def test_they_are_many():
    assert len(set(BLOCKS)) == len(BLOCKS) >= 60


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-2][9:60])
def test_one_line(block, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, codes = mistakes.play(block, tiny, tmp_path)
    assert found.replace("'", "") == block.replace("'", "") and codes == [
        2
    ]  # argparse quotes choices before Python 3.12
    assert block.count("\nlifequant: error: ") == 1 and not (tmp_path / "experiment").exists()


@pytest.mark.parametrize("number", [0, 10, 45])
def test_by_a_process_of_its_own(number, tiny, tmp_path):
    of_main = [block for block in BLOCKS if block.splitlines()[-2].startswith("$ python main.py ")]
    *_, line, answer = of_main[number].splitlines()
    script = mistakes.TOP / "resnet-20-cifar-10" / "main.py"
    words = [word if word != "csvs" else str(tiny.csvs) for word in shlex.split(line[2:])[2:]]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", answer + "\n")


FAULT = """
import sys
from lifequant import train
from lifequant.__main__ import main
def broken(*_):
    raise ZeroDivisionError("of our own")
train.end_epoch = broken
sys.exit(main())
"""


def test_a_fault_of_our_own(tiny, tmp_path):
    """Its traceback, then a line that asks to report it and says where the state lies."""
    job = tmp_path / "job"

    def fault(**more: object) -> str:
        words = arguments(settings(tiny, job, method="original", **more))
        env = {**os.environ, "PYTHONPATH": str(Path(mistakes.TOP))}
        done = subprocess.run(
            [sys.executable, "-c", FAULT, *words], capture_output=True, text=True, env=env, timeout=100
        )
        assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError: of our own" in done.stderr
        return done.stderr.splitlines()[-1]

    asked = "lifequant: this is a fault of LifeQuant's: please report it with the lines above; "
    assert fault() == asked + "there is no checkpoint to go on with"
    train(tiny, job, method="original", reset=True)
    state = job / "checkpoint" / "last.pt"
    shutil.copy(job / "checkpoint" / "task0.pt", state)
    last = fault(resume=True)
    assert last == f"{asked}--resume goes on from task 1, step 0, which {state} has"
