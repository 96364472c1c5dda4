"""A trained model, ready to predict."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from lifequant.checkpointing import checkpoint
from lifequant.checkpointing.packed import load_packed
from lifequant.common.errors import UserError
from lifequant.data.augment import normalize
from lifequant.data.photographs import as_evaluated, shorter_side
from lifequant.models.build import build


def load(job_dir: str | Path) -> nn.Module:
    """The model of a run, in eval mode, with ``class_names`` (list of str), ``image_size`` (pixels a side), ``resize`` (to
    which an image's shorter side is scaled before its middle is taken) and ``preprocess`` (image -> input).

    ``job_dir`` is a run's folder, a model_best.pt, or a packed model (FILE.safetensors). ``model.preprocess(image)`` takes a
    path or a PIL image and gives float32 [1, 3, size, size], as in training. Both raise UserError.

    >>> model = lifequant.load("experiment/quickstart/ours")  # doctest: +SKIP
    >>> model.class_names[model(model.preprocess("seven.png")).argmax()]  # doctest: +SKIP
    """
    path = Path(job_dir)
    if path.suffix.lower() == ".safetensors":
        model, names, size, resize, _ = load_packed(path)
    else:
        model, names, size, resize = _load_checkpoint(path)

    def preprocess(image: str | Path | Image.Image) -> Tensor:
        image = image if isinstance(image, Image.Image) else Path(image)
        return normalize(as_evaluated(image, size, resize)[None], model.statistics)

    model.class_names, model.image_size, model.resize, model.preprocess = names, size, resize, preprocess
    return model.eval()


def _load_checkpoint(path: Path) -> tuple[nn.Module, list[str], int, int]:
    """(model, class names, image size, resize) of a run's folder or a model_best.pt."""
    found = checkpoint.find_model(path)
    if found is None:
        path = path / "model_best.pt" if path.is_dir() else path
        raise UserError(f"{path}: no such model; a run writes it at its end")
    state = checkpoint.read(found, "model")
    config, names, size = checkpoint.network_of(state, found)
    model = build(config, len(names))
    checkpoint.load_strictly(found, model, state["model"])
    return model, names, size, shorter_side(config.augment, size)
