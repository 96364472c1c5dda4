"""Checkpoints: one schema number, written whole or not at all, read as data only (weights_only).

There are two kinds. A ``run`` holds everything that the rest of a run depends on: checkpoint/last.pt (the one before it is
checkpoint/previous.pt), and checkpoint/task<t>.pt at each task's end. A ``model`` is a trained model: model_best.pt.

A file is torch.save's zip archive. The archive has a CRC for each part of it, which finds a damaged file.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lifequant import options, registry
from lifequant.common import fault_injection
from lifequant.common.errors import UserError
from lifequant.common.files import sync_folder
from lifequant.common.safe_files import short
from lifequant.config import Config
from lifequant.data.augment import statistics_of

SCHEMA = 3
LAST, PREVIOUS = "last.pt", "previous.pt"
LARGEST_IMAGE = 4096  # pixels a side
REQUIRED = {
    "run": {"config": dict, "data_key": list, "task_index": int, "step": int, "model": dict, "optimizer": dict,
            "method": dict, "history": dict, "warnings": list},
    "model": {"config": dict, "options": dict, "class_names": list, "preprocessing": dict, "model": dict},
}  # fmt: skip
NETWORK = (
    "target_model",
    "shortcut",
    "stem",
    "quantizer",
    "act_quantizer",
    "bitW",
    "abitW",
    "first_last_bits",
    "per_channel",
    "layer_bits",
    "seed",
    "image_size",
    "augment",  # how evaluation cuts images out
)  # fmt: skip  settings that make the network


def write(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` by a temporary file in the same folder that replaces ``path`` once it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content(state))


def content(state: dict[str, Any]) -> memoryview:
    """The bytes of a checkpoint's file."""
    buffer = io.BytesIO()
    torch.save({"schema": SCHEMA, **state}, buffer)
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


def is_intact(path: Path) -> bool:
    """Whether the file is an archive as torch.save writes it, and each part of it what was written. Raises OSError.

    Nothing in such an archive is compressed, so that a file takes no more memory than it has on disk.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            begins = min((member.header_offset for member in members), default=-1) == 0
            size = sum(member.file_size for member in members)
            return stored and begins and size <= path.stat().st_size and archive.testzip() is None
    except FileNotFoundError:
        raise
    except Exception:  # a damaged directory makes zipfile raise errors of many types
        return False


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


def read(path: Path, kind: str) -> dict[str, Any]:
    """A checkpoint of that kind, on the CPU. Raises UserError for anything else."""
    try:
        if not is_intact(path):
            raise ValueError
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (MemoryError, torch.OutOfMemoryError):  # not the file's fault
        raise
    except Exception:  # for what isn't a checkpoint torch.load raises errors of a dozen types
        raise UserError(f"{path}: not a checkpoint that can be read: it is damaged, or no checkpoint at all") from None
    if not isinstance(state, dict) or state.get("kind") not in ("run", "model"):
        raise UserError(f"{path}: not a {kind} checkpoint of LifeQuant's: use another file")
    if state.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: another version of LifeQuant wrote it (schema {short(state.get('schema'))}, this one has {SCHEMA}): "
            "use that version, or train anew"
        )
    if state["kind"] != kind:
        raise UserError(f"{path}: this is a {state['kind']} checkpoint, and a {kind} checkpoint is needed")
    for name in REQUIRED[kind]:
        if not isinstance(state.get(name), REQUIRED[kind][name]):
            raise UserError(f"{path}: it has no {name}, which a {kind} checkpoint needs: use another file")
    return state


def to_device(state: Any, device: torch.device) -> Any:
    """A state whose tensors are on ``device``."""
    return tree_map_only(torch.Tensor, lambda value: value.to(device), state)


@contextmanager
def fitting(path: Path, what: str) -> Iterator[None]:
    """Around what takes over ``what`` of a file: a misfit becomes a UserError that gives the reason.

    Other errors pass: a device's error is not the file's fault.
    """
    try:
        yield
    except (KeyError, ValueError, IndexError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error)
        if "CUDA" in reason or not any(word in reason for word in ("state_dict", "size", "shape")):
            raise
    else:
        return
    raise UserError(
        f"{path}: its {what} does not fit this run ({short(' '.join(reason.split()))}): use another checkpoint, or begin anew "
        "(--reset)"
    )


def refuse_other_run(state: dict[str, Any], data_key: list[str], processes: int, path: Path) -> None:
    """Raises UserError where a run's state is of other data or of another number of processes."""
    if state.get("data_key") != data_key:
        raise UserError(f"{path}: it was trained on other images or tasks than the task CSVs name now")
    if state.get("processes") != processes:
        raise UserError(
            f"{path}: its run had {short(state.get('processes'))} processes, now there are {processes}: go on with as many"
        )


def model_state(config: Config, model: nn.Module, class_names: list[str]) -> dict[str, Any]:
    """What model_best.pt holds: the weights, and all that is needed to build the network and to feed it."""
    mean, std = map(list, statistics_of(config))
    preprocessing = {"image_size": config.image_size, "mean": mean, "std": std}
    return {
        "kind": "model",
        "config": config.asdict(paths=False),
        "options": dict(config.options),
        "class_names": class_names,
        "preprocessing": preprocessing,
        "model": to_device(model.state_dict(), torch.device("cpu")),  # so that plain torch.load reads it anywhere
    }


def find_model(path: Path) -> Path | None:
    """``path`` (of a folder its model_best.pt), or the same file in (or beside) a folder checkpoint/, where runs keep it as well."""
    path = path / "model_best.pt" if path.is_dir() else path
    other = (
        path.parent.parent / path.name if path.parent.name == "checkpoint" else path.parent / "checkpoint" / path.name
    )
    return next((p for p in (path, other) if p.is_file()), None)


def network_of(state: dict[str, Any], path: Path) -> tuple[Config, list[str], int]:
    """(the settings that make the network, class names, image size) of a model checkpoint. Raises UserError.

    Every setting is checked as the command line checks it.
    """
    with fitting(path, "content"):
        given = {name: state["config"][name] for name in NETWORK if name in state["config"]}
        names, size = list(state["class_names"]), state["preprocessing"]["image_size"]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names are not names")
        if type(size) is not int or not 8 <= size <= LARGEST_IMAGE:
            raise ValueError(f"image_size {short(size)}")
    try:
        return options.make(**given, **_quantizer_flags(given, state["options"])), names, size
    except UserError as error:
        raise UserError(f"{path}: its settings make no network: {short(error)}") from None


def _quantizer_flags(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The quantizers' own flags among ``own``, for options.make. Raises UserError for an unknown quantizer."""
    found = {}
    for quantizer in {str(settings.get(name)) for name in ("quantizer", "act_quantizer")}:
        for name, action in registry.own_flags("quantizer", quantizer).items():
            if name in own and (action.nargs != 0 or own[name]):  # a flag without a value is given where it is true
                found[name] = [] if action.nargs == 0 else own[name]
    return found


def load_float(path: Path, model: nn.Module, weights: dict[str, Any]) -> None:
    """Load all but the quantizers' own entries. Raises UserError that names the first misfit."""
    load_strictly(path, model, {k: v for k, v in weights.items() if not _of_quantizer(k)}, partly=True)


def refuse_nonfinite(path: Path, model: nn.Module) -> None:
    """Raises UserError if a weight that was loaded from ``path`` is NaN or infinite."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path}: its {name} holds NaN or infinity, since its run diverged: use another")


def _of_quantizer(key: str) -> bool:
    return any(part.endswith(("weight_quant", "act_quant", "key_quant", "value_quant")) for part in key.split("."))


def load_strictly(path: Path, model: nn.Module, weights: dict[str, Any], partly: bool = False) -> None:
    """Load; with ``partly`` the quantizers' own entries may be missing. Raises UserError that names the first misfit."""
    ours = model.state_dict()
    for name, value in weights.items():
        if name not in ours or not torch.is_tensor(value):
            raise UserError(f"{path}: its {short(name)} does not fit this network, which has no such tensor")
        if (value.shape, value.dtype) != (ours[name].shape, ours[name].dtype):
            theirs, needed = (f"{list(t.shape)} {t.dtype}" for t in (value, ours[name]))
            raise UserError(f"{path}: its {name} is {theirs}, and this network's is {needed}")
    missing = [name for name in ours if name not in weights and not (partly and _of_quantizer(name))]
    if missing:
        raise UserError(f"{path}: it has no {missing[0]}, which this network needs")
    model.load_state_dict(weights, strict=False)
