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
from lifequant.checkpointing import checked, checked_run, checkpoint, run_folder
from lifequant.checkpointing.async_writer import Writer
from lifequant.common.errors import UserError
from lifequant.config import Config
from lifequant.data.dataset import DataSet, data_key
from lifequant.data.task import Batch, Task
from lifequant.losses import distillation
from lifequant.methods.base import LifelongMethod
from lifequant.models.build import build
from lifequant.penalties.base import PENALTIES
from lifequant.qat.oscillations import Oscillations
from lifequant.qat.scales import Scales, param_groups
from lifequant.runtime import distributed
from lifequant.runtime.log import Log
from lifequant.training.ema import WeightAverage
from lifequant.training.history import new_history
from lifequant.training.nonfinite import Watch
from lifequant.training.timer import Clock


class Run:
    """A run's state: what a checkpoint holds, and what is built anew from the config."""

    def __init__(
        self, config: Config, log: Log, device: torch.device, dataset: DataSet, began: float | None = None
    ) -> None:
        self.config, self.log, self.device, self.data = config, log, device, dataset
        self.model = distributed.synchronized(build(config, dataset.num_classes).to(device), device)
        self.method: LifelongMethod = registry.method(config.method)(config)
        self.guard = PENALTIES[config.penalty](config) if config.penalty != "none" else self.method
        self.num_tasks = 1 if self.method.joint else len(dataset.ids)
        self.task_index = self.step = 0  # task, and steps done in it
        self.callbacks = [self.method] if self.guard is self.method else [self.method, self.guard]
        self.scales = Scales(self.model)
        self.watch = Watch(config, self.model, device)
        self.teacher: nn.Module | None = None  # the former task's model, where something distils from it
        self.teach: Callable[[Tensor], Tensor] | None = None  # its forward, compiled where the step is
        if (config.distill or self.method.needs_teacher) and self.num_tasks > 1:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
            self.teach = self.teacher
        self.known = torch.zeros(dataset.num_classes, dtype=torch.bool, device=device)  # classes of former tasks
        self.known_share = torch.zeros((), device=device)  # of the classes seen until now
        self.average = WeightAverage(config.ema) if config.ema else None
        track = config.track_oscillations or config.freeze_oscillating is not None
        self.oscillations = Oscillations(config.freeze_oscillating) if track else None
        self.optimizer = self.make_optimizer()
        self.data_key = data_key(dataset)
        self.sums = torch.zeros(5, device=device)  # results.step_sums since the last reading
        self.epoch_sums = torch.zeros(5, device=device)  # since the epoch's begin
        self.best: dict[str, Any] = {}  # of the task, with --val_fraction
        self.history = new_history()
        self.timer = Clock(self.history, began)
        self.writer = Writer()
        self.compiled = False  # as decided at the run's begin
        self.losses = self.compute_losses

    def make_optimizer(self) -> torch.optim.SGD:
        """SGD, anew for each task."""
        config = self.config
        groups = param_groups(self.model, config.lr, config.weight_decay, config.step_lr)
        for group in groups:
            group["highest_lr"] = group["lr"]
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)

    def compute_losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, task loss, penalty before lambda): the part of the step that torch.compile takes whole."""
        with self.autocast():
            logits = self.model(batch.x)
        logits = logits.float()
        task_loss = self.method.task_loss(logits, batch)
        if self.config.distill and batch.teacher is not None:
            old = distillation(logits, batch.teacher, self.known, self.config.distill_temperature)
            task_loss = task_loss + self.config.distill * self.known_share * old
        return logits, task_loss, self.guard.penalty(self.model) + self.guard.output_penalty(logits, batch)

    def autocast(self) -> AbstractContextManager:
        """With ``--amp bf16`` convolutions and the head compute in bfloat16, in training; quantizers stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.amp == "bf16" else nullcontext()

    def load_teacher(self, task: Task) -> None:
        """What belongs to no method, at a task's first step and after a resumption: teacher and known classes."""
        self.known.copy_(task.old_classes)
        seen = torch.bincount(task.labels[task.pool], minlength=len(task.old_classes)) > 0
        self.known_share.copy_(task.old_classes.sum() / (task.old_classes | seen).sum())
        if self.teacher is not None and task.task_index > 0:
            self.writer.wait()
            former = checkpoint.read(run_folder.task_file(self.config.job_dir, task.task_index - 1), "run", self.device)
            self.teacher.load_state_dict(former["model"])

    def with_teacher(self, batch: Batch) -> Batch:
        """The batch with the former model's logits, zeros in task 0; as it is where nothing asks for them."""
        if self.teach is None:
            return batch
        if self.task_index == 0:
            return batch._replace(teacher=batch.x.new_zeros(len(batch.y), len(self.known)))
        with torch.no_grad(), self.autocast():
            return batch._replace(teacher=self.teach(batch.x).float())

    def state(self) -> dict[str, Any]:
        """What a checkpoint is to hold; the time until now is counted."""
        self.timer.stop()
        if former := self.watch.state(self):
            return former
        return self.content()

    def content(self) -> dict[str, Any]:
        """The state as it is, without a copy."""
        return {
            "kind": "run",
            "config": self.config.asdict(),
            "data_key": self.data_key,
            "task_index": self.task_index,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "penalty": None if self.guard is self.method else self.guard.state_dict(),
            "average": self.average and self.average.state_dict(),
            "bounded": self.scales.limited_updates,
            "oscillations": self.oscillations and self.oscillations.state_dict(),
            "sums": self.sums,
            "epoch_sums": self.epoch_sums,
            "best": self.best,
            "history": self.history,
            "warnings": self.log.warnings,
            "compiled": self.compiled,
            "processes": distributed.world_size(),
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        if state["data_key"] != self.data_key:
            raise UserError(f"{path}: it was trained on other images or tasks than the task CSVs name now")
        if state["processes"] != distributed.world_size():
            raise UserError(
                f"{path}: its run had {state['processes']} processes, now there are {distributed.world_size()}: go on with as many"
            )
        checked_run.fits(state, self, path)
        checkpoint.load_strictly(path, self.model, state["model"])
        self.task_index, self.step, self.best = state["task_index"], state["step"], state["best"]
        self.history, self.log.warnings = state["history"], list(state["warnings"])
        self.timer = Clock(self.history, self.timer.since)
        self.sums.copy_(state["sums"])
        self.epoch_sums.copy_(state["epoch_sums"])
        with checked.loading(path, "optimizer's, method's or penalty's state"):
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.load_state_dict(state["method"])
            if self.guard is not self.method:
                self.guard.load_state_dict(state["penalty"])
            self.scales.limited_updates.copy_(state["bounded"])
            for name in ("average", "oscillations"):
                if state[name] is not None and getattr(self, name) is not None:
                    getattr(self, name).load_state_dict(state[name])
            with torch.no_grad():
                if self.task_index or self.step:
                    self.guard.penalty(self.model)  # what doesn't fit fails here, not in the midst of training
