"""A method and a penalty of another package, with state of every kind: trained, killed, resumed, equal to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from support.equal import same
from support.tiny import arguments, settings

import lifequant
from lifequant.checkpointing import checkpoint

PACKAGE = '''
import torch
from lifequant.methods.base import LifelongMethod
from lifequant.methods.importance import protected
from lifequant.common.arguments import real
from lifequant.penalties.base import Penalty


class Prototypes(LifelongMethod):
    """Pulls the logits of a class to its moving mean."""

    help = "logits stay near their class's moving mean (nobody, 2026)"
    defaults = LifelongMethod.defaults | {"replay": True}

    def __init__(self, config):
        super().__init__(config)
        self.prototypes, self.seen, self.note = None, [], "new"

    def begin_task(self, model, task):
        super().begin_task(model, task)
        if self.prototypes is None:
            self.prototypes = torch.zeros(task.num_classes, task.num_classes)
        self.seen.append(sorted(task.classes))
        self.note = f"task {task.task_index}"

    def task_loss(self, logits, batch):
        with torch.no_grad():
            self.prototypes[batch.y] = 0.9 * self.prototypes[batch.y] + 0.1 * logits
        return super().task_loss(logits, batch) + 0.01 * (logits - self.prototypes[batch.y]).square().mean()

    def state_dict(self):
        return super().state_dict() | {"prototypes": self.prototypes, "seen": self.seen, "note": self.note}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.prototypes, self.seen, self.note = state["prototypes"], list(state["seen"]), state["note"]

    def memory_bytes(self):
        return {"prototypes": self.prototypes.nbytes}


class Pull(Penalty):
    help = "weights stay near the former ones, in a norm of one's own (nobody, 2026)"
    default_lambda = 0.1

    @staticmethod
    def add_args(group):
        group.add_argument("--pull_power", type=real(1), default=2.0, help="the norm's power")

    def __init__(self, config):
        super().__init__(config)
        self.anchors, self.steps = {}, [0, {"label": "steps"}]

    def begin_task(self, model, task):
        self.anchors = {name: p.detach().clone() for name, p in protected(model).items()}

    def penalty(self, model):
        power = self.config.option(self.name)["power"]
        return sum((p - self.anchors[name]).abs().pow(power).sum() for name, p in protected(model).items())

    def after_step(self, model, lr_ratio):
        self.steps[0] += 1

    def state_dict(self):
        return {"anchors": self.anchors, "steps": self.steps}

    def load_state_dict(self, state):
        self.anchors, self.steps = state["anchors"], state["steps"]
'''
POINTS = "[lifequant.methods]\nprototypes = other:Prototypes\n[lifequant.penalties]\npull = other:Pull\n"


def test_killed_and_resumed(tiny, tmp_path):
    """SIGKILL in the midst of task 1. The optimizer is AdamW, whose state is more than a momentum buffer."""
    (tmp_path / "other.py").write_text(PACKAGE)
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    path = os.pathsep.join([str(Path(lifequant.__file__).parents[1]), str(tmp_path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    flags = {"method": "prototypes", "penalty": "pull", "pull_power": 1.5, "optimizer": "adamw", "lr": 0.001,
             "num_epochs": 3, "checkpoint_seconds": 0}  # fmt: skip

    def start(job: Path, **more: object) -> subprocess.Popen:
        words = [sys.executable, "-m", "lifequant", *arguments(settings(tiny, job, **flags, **more))]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    straight, process = start(whole), start(killed)
    last, end = killed / "checkpoint" / "last.pt", killed / "checkpoint" / "task0.pt"
    deadline = time.monotonic() + 120
    while not (end.exists() and last.stat().st_mtime_ns > end.stat().st_mtime_ns + 100_000_000):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = checkpoint.read(last, "run")
    assert (state["task_index"], process.returncode) == (1, -signal.SIGKILL) and 0 < state["step"] < 15
    assert state["method"]["prototypes"].dim() == 2 and state["method"]["note"] == "task 1"
    resumed = start(killed, resume=True)
    for done in (straight, resumed):
        assert (said := done.communicate()[0]) and done.returncode == 0, said
    ends = [checkpoint.read(folder / "checkpoint" / "last.pt", "run") for folder in (whole, killed)]
    same(*ends)
    assert ends[0]["penalty"]["steps"][0] == 3 * 4 + 3 * 5 and len(ends[0]["method"]["seen"]) == 2
    assert not torch.equal(ends[0]["penalty"]["anchors"]["fc.weight"], ends[0]["model"]["fc.weight"])
