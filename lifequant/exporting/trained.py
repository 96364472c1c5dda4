"""What ``lifequant export`` takes of a run: the network, also as it was after a task, and the images to check it with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lifequant
from lifequant import options
from lifequant.checkpointing import checkpoint, run_folder
from lifequant.common.errors import UserError
from lifequant.config import Config
from lifequant.data.dataset import load_dataset
from lifequant.evaluate_only import settings_of_run, with_data_of
from lifequant.predict import load
from lifequant.predict_images import decoded, image_files

CALIBRATION = 512  # training images
RANDOM = 256  # images, where there are no others


@dataclass
class Trained:
    """``folder`` is the run's, ``path`` the model's file; ``settings`` are the run's; a packed file has no ``config``."""

    model: nn.Module
    path: Path
    folder: Path
    settings: dict[str, Any]
    config: Config | None
    task: int | None

    def facts(self) -> dict[str, object]:
        """What the file says of the network."""
        found = {
            "class_names": self.model.class_names,
            "lifequant": lifequant.__version__,
            "image_size": self.model.image_size,
            **({"resize": self.model.resize} if self.model.resize != self.model.image_size else {}),
            **{name: self.settings.get(name) for name in ("method", "quantizer", "bitW", "abitW", "target_model")},
        }
        try:
            results = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
            done = len(results["top1"]) if self.task is None else self.task + 1
            row = results["top1"][done - 1][:done]
            found |= {"tasks": done, "accuracy": round(sum(row) / len(row), 2)}
        except (OSError, ValueError, LookupError, TypeError):  # a model file has none beside it
            pass
        return found


def load_trained(source: Path, task: int | None) -> Trained:
    """``source`` is a job_dir or a model file. Raises UserError."""
    model = load(source)  # says what is wrong with it
    packed = source.suffix.lower() == ".safetensors"
    path = source if packed else checkpoint.find_model(source)
    folder = path.absolute().parent
    folder = folder.parent if folder.name == "checkpoint" else folder
    if packed:
        if task is not None:
            raise UserError(f"--task {task}: {path} holds one network: name the run's folder")
        return Trained(model, path, folder, settings_of_run(path), None, None)
    state = checkpoint.read(path, "model")
    settings = {**settings_of_run(path), **state["config"]}
    if task is not None:
        file = run_folder.task_file(folder, task)
        if not file.is_file():
            kept = sorted(int(p.stem[4:]) for p in file.parent.glob("task*.pt") if p.stem[4:].isdigit())
            raise UserError(
                f"--task {task}: {file} is not there"
                + (
                    f" (there are tasks {', '.join(map(str, kept))})"
                    if kept
                    else " (--keep_checkpoints tasks keeps them)"
                )
            )
        checkpoint.load_strictly(file, model, checkpoint.read(file, "run")["model"])
    checkpoint.refuse_nonfinite(path, model)
    return Trained(model, path, folder, settings, checkpoint.network_of(state, path)[0], task)


@dataclass
class Images:
    """uint8 [N, 3, H, W]; ``name`` says which they are."""

    name: str
    test: Tensor
    labels: np.ndarray | None
    calibration: Tensor


def images_of_run(trained: Trained) -> Images:
    """The test images of the run's tasks so far, and some training images. Raises UserError."""
    data = load_dataset(
        with_data_of(options.make(), trained.settings, (), trained.path), torch.device("cpu"), lambda _: None
    )
    if len(trained.model.class_names) != data.num_classes:
        raise UserError(f"{trained.path}: it has {len(trained.model.class_names)} classes, its data {data.num_classes}")
    tasks = len(data.ids) if trained.task is None else trained.task + 1
    test = torch.tensor(sorted(set().union(*data.test_rows[:tasks])))
    train = torch.tensor(sorted(set().union(*data.new_rows[:tasks])))
    train = train[evenly(len(train), CALIBRATION)]
    return Images(
        "test images of the run", data.test.images[test], data.test.labels[test].numpy(), data.train.images[train]
    )


def images_of_folder(folder: str, trained: Trained) -> Images:
    """Images in class folders, or without classes, also to calibrate on. Raises UserError where there are none."""
    files = [path for path, _ in image_files([folder])]
    images = decoded(files, trained.model.image_size, trained.model.resize)
    read = [(path, image) for path, image in zip(files, images, strict=True) if isinstance(image, Tensor)]
    if not read:
        raise images[0]
    names = trained.model.class_names
    labels = [names.index(path.parent.name) if path.parent.name in names else -1 for path, _ in read]
    pixels = torch.stack([image for _, image in read])
    chosen = pixels[evenly(len(pixels), CALIBRATION)]
    return Images(f"images in {folder}", pixels, None if -1 in labels else np.array(labels), chosen)


def evenly(count: int, most: int) -> Tensor:
    """int64: at most ``most`` places of ``count``."""
    return torch.linspace(0, count - 1, min(most, count)).long()


def random_images(trained: Trained) -> Images:
    """Noise says little about accuracy; the integers are checked all the same."""
    shape = (RANDOM, 3, trained.model.image_size, trained.model.image_size)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Images("random images", pixels, None, pixels)
