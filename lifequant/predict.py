"""A trained model, ready to predict."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from lifequant.checkpointing import checkpoint
from lifequant.checkpointing.packed import load_packed
from lifequant.common.errors import UserError
from lifequant.data.augment import normalize
from lifequant.data.decode import as_pixels, decode
from lifequant.models.build import build


def load(job_dir: str | Path) -> nn.Module:
    """The model of a run, in eval mode, with ``class_names`` (list of str), ``image_size`` (pixels a side) and ``preprocess``
    (image -> input).

    ``job_dir`` is a run's folder, a model_best.pt, or a packed model (FILE.safetensors). ``model.preprocess(image)`` takes a
    path or a PIL image and gives float32 [1, 3, size, size], as in training. Both raise UserError.

    >>> model = lifequant.load("experiment/quickstart/ours")  # doctest: +SKIP
    >>> model.class_names[model(model.preprocess("seven.png")).argmax()]  # doctest: +SKIP
    """
    path = Path(job_dir)
    if path.suffix.lower() == ".safetensors":
        model, names, size, _ = load_packed(path)
    else:
        model, names, size = _load_checkpoint(path)

    def preprocess(image: str | Path | Image.Image) -> Tensor:
        pixels, _ = as_pixels(image, size) if isinstance(image, Image.Image) else decode(Path(image), size)
        return normalize(pixels[None], model.statistics)

    model.class_names, model.image_size, model.preprocess = names, size, preprocess
    return model.eval()


def _load_checkpoint(path: Path) -> tuple[nn.Module, list[str], int]:
    """(model, class names, image size) of a run's folder or a model_best.pt."""
    found = checkpoint.find_model(path)
    if found is None:
        path = path / "model_best.pt" if path.is_dir() else path
        raise UserError(f"{path}: no such model; a run writes it at its end")
    state = checkpoint.read(found, "model")
    config, names, size = checkpoint.network_of(state, found)
    model = build(config, len(names))
    checkpoint.load_strictly(found, model, state["model"])
    return model, names, size
