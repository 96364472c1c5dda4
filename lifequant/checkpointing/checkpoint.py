"""Checkpoints: one schema, a checksum, written whole or not at all, read as data only (weights_only).

Two kinds. ``run``: everything that the rest of a run depends on, of checkpoint/last.pt (the one before it is
checkpoint/previous.pt) and of checkpoint/task<t>.pt at each task's end. ``model``: a trained model, model_best.pt.

A file is torch.save's zip archive, whose comment is the SHA-256 of all before it: torch.load reads it as any other.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lifequant.checkpointing import checked
from lifequant.common import fault_injection
from lifequant.common.errors import UserError
from lifequant.common.files import sync_folder
from lifequant.config import Config
from lifequant.data.augment import MEAN, STD

SCHEMA = 2
LAST, PREVIOUS = "last.pt", "previous.pt"
_COMMENT = re.compile(rb"sha256:([0-9a-f]{64})")
_COMMENT_BYTES = 71


def write(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` by a temporary file in the same folder that replaces ``path`` once it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content(state))


def content(state: dict[str, Any]) -> memoryview:
    """What a checkpoint's file holds."""
    buffer = io.BytesIO()
    torch.save({"schema": SCHEMA, **state}, buffer)
    buffer.seek(-2, io.SEEK_END)  # a zip archive ends with its comment's length (APPNOTE 4.3.16), and torch writes none
    buffer.write(struct.pack("<H", _COMMENT_BYTES))
    buffer.write(b"sha256:" + hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    return buffer.getbuffer()


def write_bytes(path: Path, content: bytes | memoryview, previous: Path | None = None) -> None:
    """Atomic: afterwards ``path`` has the new content, or, if anything failed, what it had.

    With ``previous`` the checkpoint that it had is kept under that name.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            fault_injection.point("checkpoint")
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists() and is_intact(path):  # a broken one must not take a whole one's place
            _keep(path, previous)
        fault_injection.point("rename")
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _keep(path: Path, previous: Path) -> None:
    """The file is ``previous`` too; only where the file system has no links is ``path`` not there for a moment."""
    link = previous.with_name(f".{previous.name}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous)
    except OSError:
        os.replace(path, previous)
    finally:
        link.unlink(missing_ok=True)


def is_intact(path: Path) -> bool | None:
    """Whether a checkpoint's content is what was written; None where it has no checksum. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - _COMMENT_BYTES
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        found = _COMMENT.fullmatch(file.read())
    return None if found is None else found[1].decode() == digest.hexdigest()


def read_last(path: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """A run's last checkpoint, or, with a warning, the one before it where that one is broken. Raises UserError."""
    previous = path.with_name(PREVIOUS)
    try:
        return read(path, "run"), path
    except UserError as error:
        if path.name != LAST or not previous.is_file():
            raise
        state = read(previous, "run")
        say(f"warning: {error}; the checkpoint before it is taken instead")
        return state, previous


def read(path: Path, kind: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint of that kind. Raises UserError for anything else."""
    try:
        checksum = is_intact(path)
        if checksum is False:
            raise ValueError
        checked.archive(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception:  # what isn't a checkpoint makes torch.load raise errors of a dozen types
        raise UserError(
            f"{path}: not a checkpoint that can be read; it is broken, or not a checkpoint at all"
        ) from None
    if not isinstance(state, dict) or state.get("schema") != SCHEMA or state.get("kind") != kind:
        what = state.get("kind") if isinstance(state, dict) else None
        raise UserError(
            f"{path}: not a {kind} checkpoint of schema {SCHEMA}"
            + (f" (it is a {checked.shown(what)} checkpoint)" if what else "")
        )
    if checksum is None:
        raise UserError(f"{path}: it has lost its checksum, so it is broken")
    return checked.content(state, path)


def model_state(config: Config, model: nn.Module, class_names: list[str]) -> dict[str, Any]:
    """What model_best.pt holds: the weights, and all that is needed to build the network and to feed it."""
    preprocessing = {"image_size": config.image_size, "mean": list(MEAN), "std": list(STD)}
    return {
        "kind": "model",
        "config": config.asdict(paths=False),
        "options": dict(config.options),
        "class_names": class_names,
        "preprocessing": preprocessing,
        "model": model.state_dict(),
    }


def find_model(path: Path) -> Path | None:
    """``path``, or the same file in (or beside) a folder checkpoint/, where runs keep it as well."""
    other = (
        path.parent.parent / path.name if path.parent.name == "checkpoint" else path.parent / "checkpoint" / path.name
    )
    return next((p for p in (path, other) if p.is_file()), None)


def load_source(path: Path, config: Config, model: nn.Module, num_classes: int) -> bool:
    """Load a source model. True where its quantizers fit and were loaded with it; False where steps must be derived.

    Raises UserError where architecture or class count differ.
    """
    state = read(path, "model")
    checked.model_config(state, path)
    theirs, weights = state["config"], state["model"]
    checked.finite(weights, path)
    same = {"target_model": config.target_model, "shortcut": config.shortcut}
    for name, ours in same.items():
        if theirs.get(name) != ours:
            raise UserError(f"{path}: its {name} is {theirs.get(name)}, this run's is {ours}")
    checked.model_classes(state, path)
    if len(state["class_names"]) != num_classes:
        raise UserError(f"{path}: it has {len(state['class_names'])} classes, the data set has {num_classes}")
    theirs = {"act_quantizer": theirs["quantizer"], "per_channel": False, "layer_bits": None, **theirs}
    quant = ("quantizer", "act_quantizer", "bitW", "abitW", "first_last_bits", "per_channel", "layer_bits")
    if all(theirs[name] == getattr(config, name) for name in quant):
        load_strictly(path, model, weights)
        return True
    load_strictly(path, model, {k: v for k, v in weights.items() if not _of_quantizer(k)}, partly=True)
    return False


def _of_quantizer(key: str) -> bool:
    return any(part in ("weight_quant", "act_quant") for part in key.split("."))


def _form(value: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return value.shape, value.dtype


def load_strictly(path: Path, model: nn.Module, weights: dict[str, Any], partly: bool = False) -> None:
    """Load; with ``partly`` the quantizers' own entries may lack. Raises UserError for any other misfit."""
    ours = model.state_dict()
    for name, value in weights.items():
        if name not in ours or not torch.is_tensor(value) or _form(ours[name]) != _form(value):
            raise UserError(f"{path}: its {checked.shown(name)} does not fit this network")
    lacking = [name for name in ours if name not in weights and not (partly and _of_quantizer(name))]
    if lacking:
        raise UserError(f"{path}: it has no {lacking[0]!r}, which this network needs")
    model.load_state_dict(weights, strict=False)
