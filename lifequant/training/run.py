"""A run's state: what a checkpoint holds, and what is built anew from the config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lifequant import registry
from lifequant.checkpointing import checkpoint, run_folder
from lifequant.checkpointing.async_writer import Writer
from lifequant.common.errors import UserError
from lifequant.config import Config
from lifequant.data import codec
from lifequant.data.dataset import DataSet, data_key
from lifequant.data.task import Batch, Task
from lifequant.methods.base import LifelongMethod, TrainingHooks
from lifequant.models.build import build
from lifequant.qat.code_usage import CodeCounts
from lifequant.qat.oscillations import Oscillations
from lifequant.qat.scales import Scales, param_groups
from lifequant.runtime import distributed
from lifequant.runtime.log import Log
from lifequant.training.ema import MovingAverage
from lifequant.training.history import new_history
from lifequant.training.nonfinite import FiniteCheck
from lifequant.training.schedule import steps_per_epoch
from lifequant.training.timer import Timer


class Run:
    """The state of a run. Names that a checkpoint holds are in ``state``."""

    def __init__(
        self, config: Config, log: Log, device: torch.device, dataset: DataSet, began: float | None = None
    ) -> None:
        self.config, self.log, self.device, self.data = config, log, device, dataset
        self.method: LifelongMethod = registry.method(config.method)(config)
        own_penalty = config.penalty == "none"  # the method's own, which may be no penalty at all
        self.penalty: TrainingHooks = self.method if own_penalty else registry.penalty(config.penalty)(config)
        self.callbacks = [self.method] if own_penalty else [self.method, self.penalty]
        self.num_tasks = 1 if self.method.joint else len(dataset.ids)
        self.task_sizes = dataset.task_sizes(config, self.method.joint)
        self.expects_time = True  # until the run has said how long it will take
        self.task_index = self.step = 0  # the task, and the steps done in it
        self.reading_interval = 1  # steps of this task between two readings of the loss
        self.set_model(distributed.synchronized(build(config, dataset.num_classes).to(device), device))
        for flag in [flag for flag in ("nme", "head_epochs") if getattr(config, flag)]:
            if not any(isinstance(module, nn.Linear) for module in self.model.modules()):
                raise UserError(
                    f"--{flag}: {config.target_model} has no linear layer that could be its head: leave it out"
                )
        self.teacher: nn.Module | None = None  # the former task's model, where something distills from it
        self.teach: Callable[[Tensor], Tensor] | None = None  # its forward, compiled where the step is
        if (config.distill or self.method.needs_teacher) and self.num_tasks > 1:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
            self.teach = self.teacher
        self.old_classes = torch.zeros(dataset.num_classes, dtype=torch.bool, device=device)
        self.old_class_share = torch.zeros((), device=device)  # of the classes seen until now
        self.ema = MovingAverage(self.model, config.ema) if config.ema else None
        track = config.track_oscillations or config.freeze_oscillating is not None
        self.oscillations = Oscillations(config.freeze_oscillating) if track else None
        self.data_key = data_key(dataset)
        distills = config.distill and self.teacher is not None
        self.term_names = ["task_loss", *(["distillation"] if distills else []), "penalty"]
        self.sums = torch.zeros(len(self.term_names) + 3, device=device)  # step_sums since the last reading
        self.epoch_sums = torch.zeros_like(self.sums)  # since the epoch's begin
        self.best: dict[str, Any] = {}  # the task's best epoch, with --val_fraction
        self.history = new_history()
        self.codes: dict[str, CodeCounts] = {}  # at the end of the last task that this process has trained
        self.timer = Timer(self.history, began)
        self.writer = Writer()
        self.compiled = False  # decided when the run begins
        self.compiled_losses: Callable[[Batch], tuple[Tensor, Tensor, Tensor]] | None = None

    def steps_before(self, task_index: int) -> int:
        """Steps of the tasks before this one."""
        return sum(self.config.num_epochs * steps_per_epoch(self.config, *n) for n in self.task_sizes[:task_index])

    @property
    def global_step(self) -> int:
        """Steps done in all tasks."""
        return self.steps_before(self.task_index) + self.step

    def at(self) -> tuple[str, str]:
        """(the kind of work that an error ended, else that goes on; where in the run)."""
        return self.timer.failed or self.timer.kind, f"task {self.data.ids[self.task_index]}, step {self.step}"

    def set_model(self, model: nn.Module) -> None:
        """Train ``model`` from here on: all that refers to its parameters is made anew."""
        self.model = model
        self.scales = Scales(model)
        self.finite_check = FiniteCheck(self.config, model, self.device)
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of ``--optimizer``; each task begins with a new one."""
        config = self.config
        groups = param_groups(self.model, config.lr, config.weight_decay, config.step_lr)
        for group in groups:
            group["highest_lr"] = group["lr"]
        if config.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        return kind(groups, lr=config.lr, foreach=True)

    def autocast(self) -> AbstractContextManager:
        """With ``--amp bf16`` convolutions and the head compute in bfloat16, in training; quantizers stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.amp == "bf16" else nullcontext()

    def load_teacher(self, task: Task) -> None:
        """Set the old classes and load the former task's model, at a task's first step and after a resumption."""
        self.old_classes.copy_(task.old_classes)
        seen = torch.bincount(task.labels[task.pool], minlength=len(task.old_classes)) > 0
        self.old_class_share.copy_(task.old_classes.sum() / (task.old_classes | seen).sum())
        if self.teacher is not None and task.task_index > 0:
            self.writer.wait()
            former = checkpoint.read(run_folder.task_file(self.config.job_dir, task.task_index - 1), "run")
            self.teacher.load_state_dict(former["model"])

    def with_teacher(self, batch: Batch) -> Batch:
        """The batch with the former model's logits, zeros in task 0; the batch itself where nothing asks for them."""
        if self.teach is None:
            return batch
        if self.task_index == 0:
            return batch._replace(teacher=batch.x.new_zeros(len(batch.y), len(self.old_classes)))
        with torch.no_grad(), self.autocast():
            return batch._replace(teacher=self.teach(batch.x).float())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, not copied. The time until now is added to the history.

        Between two tasks the file is smaller: what ``begin_task`` makes anew is left out (the optimizer's state, the moving
        average, the counts of oscillations).
        """
        self.timer.stop()
        inside = self.step > 0
        return {
            "kind": "run",
            "config": self.config.asdict(),
            "data_key": self.data_key,
            "task_index": self.task_index,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict() if inside else {},
            "method": self.method.state_dict(),
            "penalty": None if self.penalty is self.method else self.penalty.state_dict(),
            "ema": self.ema.state_dict() if self.ema and inside else None,
            "limited_updates": self.scales.limited_updates,
            "oscillations": self.oscillations.state_dict() if self.oscillations and inside else None,
            "sums": self.sums,
            "epoch_sums": self.epoch_sums,
            "best": self.best,
            "history": self.history,
            "warnings": self.log.warnings,
            "stored": [torch.tensor(rows, dtype=torch.int32) for rows in self.data.chosen],
            "codec": codec.versions(self.config.replay_codec),
            "compiled": self.compiled,
            "processes": distributed.world_size(),
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Take over what ``state`` gave; ``path`` is where it comes from. Raises UserError where it does not fit."""
        if (theirs := state.get("codec", {})) != (ours := codec.versions(self.config.replay_codec)):
            raise UserError(
                f"{path}: its replay images were coded by {_listed(theirs)}, here is {_listed(ours)}: their pixels may differ; "
                "install that version, or begin anew"
            )
        checkpoint.load_strictly(path, self.model, state["model"])
        with checkpoint.fitting(path, "content"):
            self.task_index, self.step, self.best = state["task_index"], state["step"], state["best"]
            self.history, self.log.warnings = state["history"], list(state["warnings"])
            self.sums.copy_(state["sums"])
            self.epoch_sums.copy_(state["epoch_sums"])
            self.scales.limited_updates.copy_(state["limited_updates"])
            self.data.chosen = (
                [rows.tolist() for rows in state.get("stored", [])] if self.data.chooses(self.config) else []
            )
        self.task_sizes = self.data.task_sizes(self.config, self.method.joint)
        self.timer = Timer(self.history, self.timer.since)
        if self.step or state["optimizer"]:
            with checkpoint.fitting(path, "optimizer's state"):
                self.optimizer.load_state_dict(state["optimizer"])  # which sends each tensor where torch wants it
        parts = {"ema": self.ema, "oscillations": self.oscillations, "method": self.method}
        if self.penalty is not self.method:
            parts["penalty"] = self.penalty
        for name, part in parts.items():
            if part is not None and state.get(name) is not None:
                with checkpoint.fitting(path, f"{name}'s state"):
                    part.load_state_dict(checkpoint.to_device(state[name], self.device))
        if self.task_index or self.step:
            with torch.no_grad():
                self.penalty.penalty(self.model)  # what doesn't fit fails here, and not in mid-training


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "no codec"
