"""Float weights that others wrote: a state dict as torchvision, timm and plain torch.save write it, .pth or .safetensors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lifequant.checkpointing.packed import MARK
from lifequant.common.errors import UserError
from lifequant.common.safe_files import short
from lifequant.config import Config
from lifequant.models import torchvision_models
from lifequant.models.build import build_float
from lifequant.qat.layers import TORCH_LAYERS

INSIDE = ("state_dict", "model", "model_state_dict")  # keys under which training programs keep a state dict
BEFORE_NAMES = ("module.", "_orig_mod.", "model.")  # of DataParallel and DDP, torch.compile, a module around it
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of GoogLeNet and Inception that only ImageNet's training has
HARMLESS = [argparse.Namespace, np.dtype, np.dtypes.Float64DType, np._core.multiarray.scalar]  # beside the tensors
NAMED = 3  # misfits in a message


def read(path: Path) -> Any:
    """What a file holds, as data only. Raises UserError where it can't be read so."""
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # for what isn't a checkpoint torch.load raises errors of a dozen types
        why = "it is damaged, or no checkpoint at all"
        if "WeightsUnpickler error: Unsupported" in str(error):
            why = "it holds more than tensors: torch.save(model.state_dict(), ...) writes a file that can be read"
        raise UserError(f"{path}: not a checkpoint that can be read: {why}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path}: safetensors is missing: pip install lifequant[export]") from None
    try:
        with safe_open(path, "pt") as file:
            if MARK in (file.metadata() or {}):
                raise UserError(f"{path}: a packed model of LifeQuant's: give the run that it was made of")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no safetensors file that can be read ({short(error)})") from None


def state_dict_in(found: Any, where: object) -> dict[str, Tensor]:
    """The state dict in a checkpoint, with plain names. Raises UserError if there is none."""
    for _ in range(2):
        if isinstance(found, Mapping) and not any(map(torch.is_tensor, found.values())):
            found = next((found[key] for key in INSIDE if isinstance(found.get(key), Mapping)), found)
    tensors = {str(k): v for k, v in found.items() if torch.is_tensor(v)} if isinstance(found, Mapping) else {}
    tensors.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    if not tensors:
        raise UserError(f"{where}: no state dict in it (a dict of tensors, or one as {', '.join(map(repr, INSIDE))})")
    while before := next((b for b in BEFORE_NAMES if all(name.startswith(b) for name in tensors)), None):
        tensors = {name.removeprefix(before): value for name, value in tensors.items()}
    return tensors


def load_float(
    where: object, tensors: dict[str, Tensor], config: Config, num_classes: int, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """The float state of ``config``'s network with these weights. Raises UserError that names what does not fit.

    A head of another class count is left out, and keeps its random weights; position embeddings of a Vision Transformer are
    interpolated to the run's image size. torch's own loading knows the names of former versions.
    """
    net = build_float(config, num_classes)
    state = net.state_dict()
    if config.target_model.startswith("densenet"):  # torchvision's files have the names of its first version
        tensors = {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", name): value for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(AUXILIARY)}
    tensors = torchvision_models.fitted_positions(config.target_model, config.image_size, tensors, state)
    tensors = _with_our_head_name(net, tensors)
    new = _other_head(net, tensors)
    for name in new:
        del tensors[name]
    misfits = [
        f"{name} is {list(value.shape)}, here {list(state[name].shape)}"
        for name, value in tensors.items()
        if name in state and value.shape != state[name].shape
    ]
    if not misfits:
        found = net.load_state_dict(tensors, strict=False)
        misfits = [f"{name} is not in {config.target_model}" for name in found.unexpected_keys]
        misfits += [
            f"{name} is missing" for name in found.missing_keys if name not in new and "num_batches_tracked" not in name
        ]
    if misfits:
        more = f", and {len(misfits) - NAMED} more" if len(misfits) > NAMED else ""
        stem = "; --stem imagenet has its first layer" if misfits[0].startswith("conv1.weight is") else ""
        raise UserError(
            f"{where}: its weights do not fit {config.target_model}: {'; '.join(map(short, misfits[:NAMED]))}{more}{stem}"
        )
    if new:
        say(f"source {where}: its head has another number of classes, so this run's begins anew ({', '.join(new)})")
    return net.state_dict()


def _with_our_head_name(net: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with our name of the head where theirs is another one (``linear.weight`` for ``fc.weight``)."""
    head, module = _head(net)
    theirs = {name.rpartition(".")[0] for name in tensors.keys() - net.state_dict().keys()}
    if len(theirs) != 1 or f"{head}.weight" in tensors:
        return tensors
    before = f"{theirs.pop()}."
    weight = tensors.get(f"{before}weight")
    if weight is None or weight.shape[1:] != module.weight.shape[1:]:
        return tensors
    return {f"{head}.{name.removeprefix(before)}" if name.startswith(before) else name: value
            for name, value in tensors.items()}  # fmt: skip


def _head(net: nn.Module) -> tuple[str, nn.Module]:
    return [(name, m) for name, m in net.named_modules() if isinstance(m, TORCH_LAYERS)][-1]


def _other_head(net: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the head's tensors, if they are of another class count."""
    name, head = _head(net)
    own = {f"{name}.{key}": value for key, value in head.state_dict().items()}
    other = any(key in tensors and len(tensors[key]) != len(value) for key, value in own.items() if value.dim())
    return [key for key in own if key in tensors] if other else []


def download(config: Config) -> dict[str, Tensor]:
    """The weights of --source_weights, from torch's cache of downloads or from the network. Raises UserError."""
    weights = torchvision_models.weights_of(config.target_model, config.source_weights)
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:  # RuntimeError: another hash
        raise UserError(
            f"--source_weights {config.source_weights}: no download here ({short(error)}): bring the file {weights.url} and give "
            "it by --source_file"
        ) from None
