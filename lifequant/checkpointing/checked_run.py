"""What a run's checkpoint must be before the run takes it over: of the structure that the run's own state has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lifequant.checkpointing.checked import LARGEST_COUNT, finite, misfit, shown

if TYPE_CHECKING:
    from lifequant.training.run import Run

_NUMBERS = (float, int)


def fits(state: Mapping[str, Any], run: Run, path: Path) -> None:
    """Whether a run's state has the structure of a new run's: types, names, shapes and dtypes."""
    fresh = run.content()
    if state["task_index"] > run.num_tasks:
        misfit(path, "task_index", state["task_index"])
    groups, params = state["optimizer"].get("param_groups"), state["optimizer"].get("state")
    like(path, "optimizer, param_groups", fresh["optimizer"]["param_groups"], groups)
    if not isinstance(params, dict):
        misfit(path, "optimizer, state", params)
    ours = dict(enumerate(p for group in run.optimizer.param_groups for p in group["params"]))
    for index, kept in params.items():
        if index not in ours or not isinstance(kept, dict) or set(kept) - {"momentum_buffer"}:
            misfit(path, "optimizer, state", kept)
        for value in kept.values():
            if value is not None:
                like(path, "optimizer, state", ours[index].detach(), value)
    for name in ("sums", "epoch_sums", "bounded"):
        like(path, name, fresh[name], state[name])
    for name in ("method", "penalty"):
        if (fresh[name] is None) != (state[name] is None) or set(fresh[name] or ()) != set(state[name] or ()):
            misfit(path, name, state[name])
        _part(path, name, state[name] or {}, run)
    if run.ema and state["ema"] is not None:
        average = state["ema"].get("average")
        if average != {}:
            like(path, "average", fresh["model"], average)
    if state["best"]:
        like(path, "best", {"top1": 0.0, "epoch": 0, "model": fresh["model"]}, state["best"])
    _history(path, fresh["history"], state["history"], run, state["task_index"])
    finite(state["model"], path)


def like(path: Path, name: str, ours: Any, theirs: Any) -> None:
    """The same types, keys and lengths all the way down; tensors of the same shape and dtype."""
    if isinstance(ours, Tensor):
        same = isinstance(theirs, Tensor) and theirs.shape == ours.shape and theirs.dtype == ours.dtype
    elif isinstance(ours, dict):
        same = isinstance(theirs, dict) and ours.keys() == theirs.keys()
    elif isinstance(ours, list | tuple):
        same = isinstance(theirs, list | tuple) and len(ours) == len(theirs)
    elif isinstance(ours, float):
        same = isinstance(theirs, _NUMBERS) and not isinstance(theirs, bool) and abs(theirs) < LARGEST_COUNT
    elif isinstance(ours, int) and not isinstance(ours, bool):
        same = type(theirs) is int and 0 <= theirs < LARGEST_COUNT
    else:
        same = type(theirs) is type(ours)
    if not same:
        misfit(path, name, theirs)
    if isinstance(ours, dict | list | tuple):
        for key in ours if isinstance(ours, dict) else range(len(ours)):
            like(path, f"{name}, {shown(key)}" if isinstance(key, str) else name, ours[key], theirs[key])


def _part(path: Path, name: str, part: Mapping[str, Any], run: Run) -> None:
    """The state of a method or penalty: each tensor as large as something of this run."""
    classes, rows = len(run.known), len(run.data.train.labels)
    weights = {value.numel() for value in run.model.parameters()}
    largest = max(sum(weights), sum(p.numel() for p in run.model.parameters()))
    for key, value in part.items():
        where = f"{name}, {shown(key)}"
        if key in ("counts", "known"):
            if value is not None and not (isinstance(value, Tensor) and value.shape == (classes,)):
                misfit(path, where, value)
        elif key == "stored":
            if not isinstance(value, dict):
                misfit(path, where, value)
            if value:
                _stored(path, where, value, rows, classes)
        elif isinstance(value, Tensor):
            if value.dim() > 1 or value.numel() > largest or value.is_complex():
                misfit(path, where, value)
        elif isinstance(value, dict):
            for inner in value.values():
                if (
                    not isinstance(inner, Tensor)
                    or inner.is_complex()
                    or (inner.numel() not in weights and inner.dim() > 1 and inner.numel() > max(weights))
                ):
                    misfit(path, where, inner)
        elif not isinstance(value, int | float | type(None)) or not abs(value or 0) < LARGEST_COUNT:
            misfit(path, where, value)


def _stored(path: Path, where: str, value: Mapping[str, Any], rows: int, classes: int) -> None:
    places, logits = value.get("rows"), value.get("logits")
    good = value.get("shape") == [rows, classes] and isinstance(places, Tensor) and isinstance(logits, Tensor)
    good = good and places.dtype == torch.int64 and places.dim() == 1 and logits.shape == (len(places), classes)
    if (
        not good
        or logits.dtype != torch.float16
        or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < rows)
    ):
        misfit(path, where, logits)


def _history(path: Path, fresh: Mapping[str, Any], history: Mapping[str, Any], run: Run, place: int) -> None:
    for name, ours in fresh.items():
        theirs = history.get(name)
        number = isinstance(ours, _NUMBERS)
        if name == "baseline":
            good = theirs is None or (isinstance(theirs, list) and len(theirs) == len(run.data.ids))
        else:
            good = (
                (isinstance(theirs, _NUMBERS) and not isinstance(theirs, bool))
                if number
                else type(theirs) is type(ours)
            )
        if good and name in ("top1", "top5", "top1_masked", "quantization_error"):
            good = len(theirs) == place and all(isinstance(r, list) and len(r) == len(run.data.ids) for r in theirs)
        if good and name in ("tasks", "training"):
            good = len(theirs) == place and all(isinstance(row, dict) for row in theirs)
        if good and isinstance(ours, dict):  # bytes, seconds
            good = all(isinstance(value, _NUMBERS) for value in theirs.values())
        if not good or not _numbers(theirs):
            misfit(path, f"history, {name}", theirs)


def _numbers(value: Any) -> bool:
    """Finite numbers all the way down, under names."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
                return False
            left += value.values() if isinstance(value, dict) else value
        elif value is not None and not (
            isinstance(value, _NUMBERS) and math.isfinite(value) and abs(value) < LARGEST_COUNT
        ):
            return False
    return True
