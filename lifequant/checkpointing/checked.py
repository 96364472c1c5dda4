"""What a checkpoint from elsewhere must be before anything is made of it: a file of data alone, whose names, types, shapes
and dtypes are those of the network and the run that it claims to be.

Every function raises UserError with the file's path for anything else, and allocates nothing that the file hasn't.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lifequant.common.errors import UserError
from lifequant.config import Config

NAME_LENGTH = 255  # of a class: it was a folder's name
LARGEST_IMAGE = 4096  # pixels a side
LARGEST_COUNT = 2**53
_MODEL = {"config": dict, "options": dict, "class_names": list, "preprocessing": dict, "model": dict}
_RUN = {"config": dict, "data_key": list, "task_index": int, "step": int, "model": dict, "optimizer": dict, "method": dict,
        "penalty": (dict, type(None)), "ema": (dict, type(None)), "bounded": Tensor,
        "oscillations": (dict, type(None)), "sums": Tensor, "epoch_sums": Tensor, "best": dict, "history": dict,
        "warnings": list, "compiled": bool, "processes": int}  # fmt: skip


def shown(value: Any) -> str:
    """A value of an untrusted file, for a message: short, whatever it is."""
    if isinstance(value, str | int | float | bool | type(None)):
        text = repr(value) if not isinstance(value, int) or abs(value) < LARGEST_COUNT else "a huge number"
        return text if len(text) <= 60 else text[:57] + "..."
    return f"of type {type(value).__name__}"


def archive(path: Path) -> None:
    """A zip archive as torch.save writes it: nothing compressed, so that it is not larger in memory than on disk.

    Raises ValueError or what zipfile raises. (The former format says how much memory to take before it is read.)
    """
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
    size = sum(member.file_size for member in members)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or size > path.stat().st_size:
        raise ValueError("compressed")


def content(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """``state`` itself, if it has the keys and types of its kind, and its tensors hold what they say they hold."""
    _walk(state, path)
    for name, kind in (_MODEL if state["kind"] == "model" else _RUN).items():
        if name not in state:
            raise UserError(f"{path}: it has no {name!r}, which a {state['kind']} checkpoint needs: use another")
        if not isinstance(state[name], kind) or (isinstance(state[name], bool) and kind is int):
            misfit(path, name, state[name])
    if state["kind"] == "run":
        for name, least in (("task_index", 0), ("step", 0), ("processes", 1)):
            if not least <= state[name] < LARGEST_COUNT:
                misfit(path, name, state[name])
        if any(not isinstance(text, str) for name in ("data_key", "warnings") for text in state[name]):
            misfit(path, "warnings", state["warnings"])
        for name in ("method", "quantizer", "target_model"):
            if not isinstance(state["config"].get(name), str):
                misfit(path, f"config, {name}", state["config"].get(name))
        for name, value in state["config"].items():
            long = isinstance(value, str | list) and len(value) > 4096
            if long or not isinstance(value, str | int | float | list | type(None)):
                misfit(path, f"config, {shown(name)}", value)
    return state


def misfit(path: Path, name: str, value: Any) -> NoReturn:
    """Raises UserError that names what of the file is wrong."""
    raise UserError(f"{path}: its {name} is {shown(value)}, which no run writes: the file is damaged, use another")


def _walk(state: Any, path: Path) -> None:
    """Plain values and dense tensors with a storage of their full size; an expanded one would be huge once copied."""
    left, seen = [state], set()
    while left:
        value = left.pop()
        if isinstance(value, dict | list | tuple):
            if id(value) in seen:
                continue
            seen.add(id(value))
            left += [*value.keys(), *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, Tensor):
            dense = value.layout is torch.strided and value.device.type != "meta" and not value.is_quantized
            if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(
                    f"{path}: a tensor in it is sparse, or larger than what is stored of it: use another file"
                )
        elif not isinstance(value, str | int | float | type(None)):
            raise UserError(f"{path}: it holds a {type(value).__name__}, which no run writes: use another file")


def model_config(state: Mapping[str, Any], path: Path) -> Config:
    """The Config of a model checkpoint, every value as its flag would take it; class names and image size bounded."""
    given = state["config"]
    known = {f.name: f for f in fields(Config) if f.metadata}
    settings = {name: value for name, value in given.items() if name in known}
    for name, value in settings.items():
        _setting(path, name, value, known[name].metadata["kwargs"], known[name].default)
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    if settings.get("image_size", 32) > LARGEST_IMAGE:
        misfit(path, "config, image_size", settings["image_size"])
    try:
        return Config(**settings, options=_options(state, path, settings))
    except UserError as error:  # of the registry
        raise UserError(f"{path}: its config names what is not known here: {error}") from None


def _options(state: Mapping[str, Any], path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    from lifequant import options, registry

    quantizer = settings.get("quantizer", "")
    registry.model(settings.get("target_model", Config.target_model))
    parser, own = options.build_parser(settings["method"], quantizer, settings.get("act_quantizer") or quantizer)
    actions = {action.dest: action for action in parser._actions if action.dest in own}
    for name, value in state["options"].items():
        if name not in actions:
            raise UserError(f"{path}: its options have {shown(name)}, which is no flag here")
        action = actions[name]
        kwargs = {"type": action.type or str, "choices": action.choices}
        _setting(path, name, value, kwargs if action.nargs != 0 else {"type": _flag}, action.default)
    return {**{name: action.default for name, action in actions.items()}, **state["options"]}


def _flag(text: str) -> bool:
    return {"True": True, "False": False}[text]


def _setting(path: Path, name: str, value: Any, kwargs: Mapping[str, Any], default: Any) -> None:
    """Whether the flag would take ``value`` and give just it."""
    if value is None or (type(value) is type(default) and value == default):
        if value is None and default is not None:
            misfit(path, f"config, {name}", value)
        return
    convert: Callable[[str], Any] = kwargs.get("type", str)
    try:
        if isinstance(value, list | tuple):  # epochs or bits
            fits = all(type(v) is int and 0 < v < LARGEST_COUNT for v in value) and (
                "nargs" in kwargs or name == "bit_schedule"
            )
        else:
            made = convert(str(value))
            fits = made == value and isinstance(value, type(made) | (int if isinstance(made, float) else type(made)))
            fits = fits and (isinstance(value, bool) == isinstance(made, bool))
    except (ValueError, TypeError, KeyError, argparse.ArgumentTypeError):
        fits = False
    if fits and kwargs.get("choices"):
        fits = value in kwargs["choices"]
    if not fits or (type(value) is int and abs(value) >= LARGEST_COUNT):
        misfit(path, f"config, {name}", value)


def model_classes(state: Mapping[str, Any], path: Path) -> list[str]:
    """The class names: texts, different, and as many as the head has rows, so that no file makes a head larger than itself."""
    names = state["class_names"]
    if not names or any(not isinstance(n, str) or len(n) > NAME_LENGTH or not n.isprintable() for n in names):
        raise UserError(f"{path}: its class_names are not names of at most {NAME_LENGTH} characters: use another file")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: a class name occurs twice in it: use another file")
    head = [value for value in state["model"].values() if isinstance(value, Tensor) and value.dim() == 2]
    if not head or len(head[-1]) != len(names):
        raise UserError(
            f"{path}: it names {len(names)} classes, its head has {len(head[-1]) if head else 0}: use another file"
        )
    return names


def image_size(state: Mapping[str, Any], path: Path) -> int:
    """Pixels a side that the model takes."""
    size = state["preprocessing"].get("image_size")
    if type(size) is not int or not 8 <= size <= LARGEST_IMAGE:
        misfit(path, "image_size", size)
    return size


def finite(weights: Mapping[str, Any], path: Path) -> None:
    """No weight is NaN or infinite."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise UserError(
                f"{path}: its {shown(name)} holds NaN or infinity: the run that wrote it diverged, use another"
            )


@contextmanager
def loading(path: Path, what: str) -> Iterator[None]:
    """Around what takes over a method's or an optimizer's state: what it can't take is the file's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError):
        raise UserError(
            f"{path}: its {what} does not fit this run: use another checkpoint, or begin anew (--reset)"
        ) from None
