"""Two processes under torchrun (gloo, CPU) against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equal import read
from support.tiny import Tiny, arguments, settings, train

from lifequant import options
from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.runtime import distributed

WORKER = Path(__file__).parent / "support" / "worker.py"


def start(processes: int, tiny: Tiny, job: Path, *first: str, **flags: Any) -> subprocess.CompletedProcess:
    words = [*first, *arguments(settings(tiny, job, **flags))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*(launcher if processes > 1 else [sys.executable]), str(WORKER), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory) -> Path:
    """A float model with BatchNorm statistics of its data."""
    job = tmp_path_factory.mktemp("source")
    train(tiny, job / "run", method="original", bitW=32, num_tasks=1, num_epochs=4, lr=0.01)
    return job / "run" / "model_best.pt"


def weights(job: Path) -> dict[str, torch.Tensor]:
    return torch.load(job / "model_best.pt", weights_only=True)["model"]


@pytest.mark.parametrize(
    ("quantizer", "bits", "bound"),
    [
        ("lsq", 32, 1e-5),
        # Sums are added in another order; a last digit that decides a code otherwise moves values by a step.
        ("lsq", 4, 1e-2),
        ("proxq", 4, 1e-2),
    ],
)
def test_as_one_process(quantizer, bits, bound, tiny, source, tmp_path):
    """20 steps by two processes with half of each batch come to the weights of one process; statistics frozen."""
    flags = {"method": "original", "quantizer": quantizer, "bitW": bits, "num_epochs": 5, "num_tasks": 1, "lr": 0.01}
    for processes in (1, 2):
        done = start(processes, tiny, tmp_path / str(processes), "--frozen", source_file=source, **flags)
        assert done.returncode == 0, done.stderr
    before, one, two = (weights(folder) for folder in (source.parent, tmp_path / "1", tmp_path / "2"))
    apart = {name: (two[name] - value).abs().max().item() for name, value in one.items()}
    moved = {name: (before[name] - value).abs().max().item() for name, value in one.items() if name in before}
    print(f"{quantizer} {bits} bits: apart by {max(apart.values()):.3g}, moved by {max(moved.values()):.3g}")
    assert max(apart.values()) <= bound
    assert all(moved[name] > 1e-3 for name in moved if name.endswith("weight")), moved
    assert all(moved[name] == 0 for name in moved if "running" in name)


def test_a_whole_run(tiny, tmp_path):
    """Ours, two tasks: one set of files, said once, with the images and metrics of all; another count is refused."""
    job = tmp_path / "run"
    done = start(2, tiny, job, method="ours", checkpoint_seconds=0)
    assert done.returncode == 0, done.stderr
    found, alone = read(job), train(tiny, tmp_path / "alone", method="ours", checkpoint_seconds=0)
    assert [found["tasks"], found["config"]] == [alone["tasks"], alone["config"]]
    assert done.stdout.count("after task 1, top-1") == 1
    assert (job / "logger.log").read_text().count("task 0 epoch 1/1  loss") == 1
    state = torch.load(job / "checkpoint/last.pt", weights_only=True)
    assert state["processes"] == 2 and state["epoch_sums"][4] == 5 * 8  # images of all processes, 5 steps of 8
    kept = torch.load(tmp_path / "alone/checkpoint/last.pt", weights_only=True)["penalty"]["importance"]
    for name, importance in state["penalty"]["importance"].items():
        assert importance.shape == kept[name].shape and importance.isfinite().all()
    (job / "results.json").unlink()
    with pytest.raises(UserError, match="its run had 2 processes, now there are 1"):
        train(tiny, job, method="ours", checkpoint_seconds=0, resume="True")
    again = start(2, tiny, job, method="ours", checkpoint_seconds=0, resume="True")
    assert again.returncode == 0, again.stderr
    assert read(job)["top1"] == found["top1"]


def test_one_line(tiny, tmp_path):
    """A batch that can't be shared out: the first process says so, once."""
    done = start(2, tiny, tmp_path / "run", method="ours", train_batch_size=7)
    lines = [line for line in done.stderr.splitlines() if line.startswith("lifequant: error")]
    assert done.returncode != 0 and len(lines) == 1 and "--train_batch_size 7" in lines[0], done.stderr
    assert not (tmp_path / "run").exists()


def test_what_can_not_be_split(monkeypatch, tiny, tmp_path):
    """A loss that is no mean over images is refused with more than one process, and only then."""
    config = options.make(method="er_ace")
    distributed.check(config, False, "er_ace")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    distributed.check(config, True, "replay")
    with pytest.raises(UserError, match="er_ace: its loss is no mean over images"):
        distributed.check(config, False, "er_ace")
    assert run_main(lambda argv: 0, []) == 0
