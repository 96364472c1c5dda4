"""A packed model: one safetensors file, with the weights as integer codes at their bit-width and all else in float32.

Its tensors are a stream of bits for each quantized layer, under the layer's name (``qat.packing.pack_codes``), and ``.rest``:
the other float32 entries of the network's state dict, in its order. The metadata say what network it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lifequant
from lifequant import registry
from lifequant.checkpointing import checkpoint
from lifequant.common.errors import UserError
from lifequant.common.safe_files import MOST_CLASSES, open_regular, short
from lifequant.config import Config
from lifequant.data.augment import statistics_of
from lifequant.data.photographs import shorter_side
from lifequant.models.build import build
from lifequant.qat.layers import weight_layers
from lifequant.qat.packing import PackedWeight, bits_and_first, pack_codes, unpack_codes
from lifequant.quantizers.base import FakeQuant

MARK = "lifequant_packed"  # the name of the metadata, a JSON object
FORMAT = 1
REST = ".rest"  # no layer's name begins with a dot
MOST_BYTES = 2**32  # of a file
MOST_HEADER = 2**23  # bytes; 100,000 class names of 60 letters fit
MOST_BITS = 24  # of a code; float32 holds it exactly
METADATA = {"network": dict, "codes": dict, "class_names": list, "image_size": int, "mean": list, "std": list, "facts": dict}  # fmt: skip
NOT_STORED = "num_batches_tracked"  # BatchNorm's count, which no output depends on


class Packed(NamedTuple):
    """What a packed file holds. ``facts`` are what its writer said of the run: method, tasks, accuracy."""

    model: nn.Module
    class_names: list[str]
    image_size: int
    resize: int  # see photographs.shorter_side
    facts: dict[str, Any]


@torch.no_grad()
def write_packed(path: Path, model: nn.Module, config: Config, class_names: Sequence[str], **facts: Any) -> None:
    """Write the network of ``config``, whole or not at all; ``facts`` are kept as JSON, without those that are None.

    Raises UserError where safetensors is not installed, for a weight that is not finite, and for a quantizer whose values
    its codes and its own entries do not say.
    """
    library = _safetensors()
    checkpoint.refuse_nonfinite(path, model)
    tensors, codes = {}, {}
    for name, layer in _quantized(model):
        quant, weight = layer.weight_quant, layer.weight
        found = quant.codes(weight)
        if not torch.equal(PackedWeight(quant, found, weight)(torch.zeros_like(weight)), quant(weight)):
            raise UserError(f"{path}: {name} can't be packed, since its {type(quant).__name__} needs more than codes")
        codes[name] = bits, first = bits_and_first(quant, found)
        tensors[name] = pack_codes(found, bits, first)
    rest, own = _others(model)
    tensors[REST] = torch.cat([value.detach().cpu().reshape(-1) for value in rest.values()])
    tensors |= {name: value.detach().cpu().contiguous() for name, value in own.items()}
    content = {
        "format": FORMAT,
        "version": lifequant.__version__,
        "network": _settings(config),
        "codes": codes,
        "class_names": list(class_names),
        "image_size": config.image_size,
        **statistics_of(config)._asdict(),
        "facts": {name: value for name, value in facts.items() if value is not None},
    }
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(path, library.save(tensors, {MARK: text}))


def load_packed(path: Path) -> Packed:
    """The network of a packed file, on the CPU, whose weights are codes (``PackedWeight``). Raises UserError."""
    with _opened(path) as file:
        found = _metadata(path, file.metadata() or {})
        network = {"act_quantizer": found["network"].get("quantizer"), **found["network"]}
        network.pop("seed", None)  # of weights that are replaced
        preprocessing = {"image_size": found["image_size"]}
        state = {**found, "config": network, "options": network, "preprocessing": preprocessing}
        config, names, size = checkpoint.network_of(state, path)
        if (found["mean"], found["std"]) != tuple(map(list, statistics_of(config))):
            raise UserError(f"{path}: its images were normalized by another mean and std than LifeQuant's")
        model = build(config, len(names))
        _fill(path, file, model, found["codes"])
    return Packed(model, names, size, shorter_side(config.augment, size), found["facts"])


def _fill(path: Path, file: Any, model: nn.Module, codes: dict[str, Any]) -> None:
    """Give the network what the file has. Raises UserError that names the first misfit."""
    layers, (rest, own) = dict(_quantized(model)), _others(model)
    if codes.keys() != layers.keys():
        odd = sorted(codes.keys() ^ layers.keys())[0]
        raise UserError(f"{path}: its codes are not of this network's layers (the first that differs: {short(odd)})")
    shapes = {REST: (torch.float32, [sum(value.numel() for value in rest.values())])}
    shapes |= {name: (value.dtype, list(value.shape)) for name, value in own.items()}
    for name, layer in layers.items():
        bits, _ = codes[name] = _checked(path, name, layer.weight_quant, codes[name])
        shapes[name] = torch.uint8, [-(-layer.weight.numel() * bits // 8)]
    tensors = _tensors(path, file, shapes)
    parts = tensors[REST].split([value.numel() for value in rest.values()])
    state = {name: part.view(value.shape) for (name, value), part in zip(rest.items(), parts, strict=True)}
    model.load_state_dict(state | {name: tensors[name] for name in own}, strict=False)
    with torch.no_grad():
        for name, layer in layers.items():
            quant, weight = layer.weight_quant, layer.weight
            values = unpack_codes(tensors[name], *codes[name], weight.numel())
            if not quant.exceeds_bits and values.numel() and values.max() > quant.qp:
                raise UserError(f"{path}: {name} has the code {int(values.max())}, and {quant.kind}, end at {quant.qp}")
            quant.calibrated = True
            layer.weight_quant = PackedWeight(quant, values, weight)
            weight.requires_grad_(False).copy_(layer.weight_quant(weight))


def _quantized(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer whose weights have codes."""
    return ((name, layer) for name, layer in weight_layers(model) if isinstance(layer.weight_quant, FakeQuant))


def _others(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What of the state dict is needed beside the codes, in its order: the float32 entries, and those of other types.

    The names are those of the network that was trained, for a packed one too.
    """
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(NOT_STORED)}
    for name, layer in _quantized(model):
        quant = f"{name}.weight_quant."
        if isinstance(layer.weight_quant, PackedWeight):
            state = {key.replace(f"{quant}quant.", quant): value for key, value in state.items()}
        for needless in (f"{name}.weight", f"{quant}stored", *(quant + own for own in layer.weight_quant.of_codes)):
            state.pop(needless, None)
    rest = {name: value for name, value in state.items() if value.dtype == torch.float32}
    return rest, {name: value for name, value in state.items() if name not in rest}


def _settings(config: Config) -> dict[str, Any]:
    """The settings that make the network, where they are not the defaults, and its quantizers' own flags."""
    found = {name: getattr(config, name) for name in checkpoint.NETWORK if name not in ("image_size", "seed")}
    same = {"act_quantizer": config.quantizer, "abitW": config.bitW}
    found = {n: v for n, v in found.items() if v not in (None, getattr(Config, n, None), same.get(n))}
    for name in {config.quantizer, config.act_quantizer or config.quantizer}:
        own = {flag: config.options.get(flag) for flag in registry.own_flags("quantizer", name)}
        found |= {flag: value for flag, value in own.items() if value is not None and value is not False}
    return found


def _metadata(path: Path, given: dict[str, str]) -> dict[str, Any]:
    """The metadata, read and checked as far as no network is needed. Raises UserError."""
    if MARK not in given:
        raise UserError(f"{path}: not a packed model of LifeQuant's (its metadata have no {MARK}): use another file")
    try:
        found = json.loads(given[MARK])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: its metadata {MARK} are no JSON object: the file is damaged")
    if found.get("format") != FORMAT:
        raise UserError(
            f"{path}: another version of LifeQuant wrote it (format {short(found.get('format'))}, this one has {FORMAT}): "
            "use that version, or write it anew"
        )
    for name, kind in METADATA.items():
        if not isinstance(found.get(name), kind):
            raise UserError(f"{path}: its {name} in the metadata is {short(found.get(name))!r}: the file is damaged")
    if len(found["class_names"]) > MOST_CLASSES:
        raise UserError(f"{path}: {len(found['class_names'])} class names, more than {MOST_CLASSES}")
    return found


def _checked(path: Path, name: str, quant: FakeQuant, given: Any) -> tuple[int, int]:
    """(bits, first code) of a layer, as the file says and its quantizer allows. Raises UserError."""
    if isinstance(given, list) and [type(value) for value in given] == [int, int]:
        bits, first = given
        if quant.exceeds_bits and 0 <= bits <= MOST_BITS and abs(first) < 2**MOST_BITS:
            return bits, first
        if not quant.exceeds_bits and (bits, first) == bits_and_first(quant, None):
            return bits, first
    raise UserError(
        f"{path}: the codes of {name} have the bits and the first code {short(given)}, which do not fit {quant.kind}"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, mapped into memory, after a look at the size of its header. Raises UserError."""
    _safetensors()
    library = import_module("safetensors")
    try:
        with open_regular(path, MOST_BYTES) as file:
            header = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise UserError(f"{path}: this packed model can't be read ({error.strerror})") from None
    try:
        if header <= MOST_HEADER:
            with library.safe_open(path, framework="pt") as file:
                yield file
            return
    except library.SafetensorError:
        pass
    raise UserError(f"{path}: not a safetensors file that can be read: it is damaged, or of another kind")


def _tensors(path: Path, file: Any, wanted: dict[str, tuple[torch.dtype, list[int]]]) -> dict[str, Tensor]:
    """The tensors of a file, which must have these names, types and shapes. Raises UserError before one is read."""
    names = set(file.keys())
    if names != wanted.keys():
        odd = sorted(names ^ wanted.keys())[0]
        has = "has a tensor" if odd in names else "has no tensor"
        raise UserError(f"{path}: it {has} {short(odd)!r}, which does not fit its network")
    for name, (_, shape) in wanted.items():
        part = file.get_slice(name)
        if part.get_shape() != shape:
            raise UserError(
                f"{path}: its {name} has the shape {short(part.get_shape())}, and its network needs {shape}"
            )
    tensors = {name: file.get_tensor(name) for name in wanted}
    for name, (dtype, _) in wanted.items():
        if tensors[name].dtype != dtype:
            raise UserError(f"{path}: its {name} is {tensors[name].dtype}, and its network needs {dtype}")
    return tensors


def _safetensors() -> Any:
    """The module safetensors.torch. Raises UserError where it is not installed."""
    try:
        return import_module("safetensors.torch")
    except ImportError:
        raise UserError('packed models need the package safetensors: pip install "lifequant[export]"') from None
