"""scripts/torture.py, and what it compares runs by."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import train
from tensorboardX import SummaryWriter

pytest.importorskip("tensorboard")
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
from lifequant.experiments.same_runs import differences  # noqa: E402


def test_whatever_differs_is_seen(tiny, tmp_path):
    """A bit of a tensor, a number of results.json, a file, a point of a curve that is lacking or there twice."""
    train(tiny, tmp_path / "run", method="original", num_tasks=1, print_freq=2)
    other = shutil.copytree(tmp_path / "run", tmp_path / "other")
    (other / "checkpoint/previous.pt").write_bytes(b"which that is depends on the time")
    assert differences(tmp_path / "run", other) == []
    path = other / "checkpoint/task0.pt"
    state = torch.load(path, weights_only=True)
    state["model"]["fc.weight"].view(torch.int32)[0, 0] ^= 1
    torch.save(state, path)
    results = other / "results.json"
    results.write_text(results.read_text().replace('"seed": 0', '"seed": 1'))
    with SummaryWriter(str(other / "run")) as writer:
        writer.add_scalar("4_learning_rate", 0.04, 4)
    (other / "model_best.pt").unlink()
    found = differences(tmp_path / "run", other)
    assert found[0] == "*.pt: model_best.pt not in both"
    assert found[1] == "checkpoint/task0.pt/model/fc.weight: tensors differ"
    assert found[2] == "results.json/config/seed: 0 and 1"
    assert found[3].startswith("curves/run/4_learning_rate: 2 and 3 entries")
    shutil.rmtree(other / "run")
    assert any("in one only" in line for line in differences(tmp_path / "run", other))


def test_torture():
    """A run of one short task, killed at every point there is."""
    pytest.importorskip("sklearn")
    words = ["--kills", "1", "--method", "original", "--", "--num_tasks", "1", "--train_batch_size", "128"]
    done = subprocess.run([sys.executable, SCRIPTS / "torture.py", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed at cache, begin, task, importance, change, checkpoint, rename, table" in done.stdout
    assert "bit for bit: 1 of 1" in done.stdout
