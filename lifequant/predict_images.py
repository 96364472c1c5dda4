"""``lifequant predict``: the classes that a trained model sees in images."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lifequant.common.arguments import Parser, int_at_least
from lifequant.common.errors import UserError, one_line
from lifequant.common.files import write_all
from lifequant.common.safe_files import short
from lifequant.data.augment import normalize
from lifequant.data.create.class_folders import EXTENSIONS
from lifequant.data.decode import is_image, quiet
from lifequant.data.photographs import as_evaluated
from lifequant.predict import load
from lifequant.runtime.onnx_session import session

NAMED = 5  # images that can't be read, in the last line


class Classifier(NamedTuple):
    """A trained model, wherever it comes from."""

    class_names: list[str]
    image_size: int  # pixels a side
    resize: int  # pixels of an image's shorter side before its middle is taken
    logits: Callable[[Tensor], Tensor]  # uint8 [N, 3, image_size, image_size] -> float32 [N, C]


class Prediction(NamedTuple):
    """The most probable classes of an image, the first one first."""

    path: Path
    folder: str  # the name of the folder that it lies in, "" for an image that was named itself
    classes: list[str]
    probabilities: list[float]


def main(argv: Sequence[str]) -> int:
    """Print the classes of each image, or write them to --csv. Raises UserError."""
    parser = Parser(description="Print the most probable classes of each image, by a trained model.")
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run's folder, a model_best.pt, a packed model (FILE.safetensors) or an exported one (FILE.onnx)",
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="image files, and folders with all that is below them"
    )
    parser.add_argument("--topk", metavar="N", type=int_at_least(1), default=5, help="classes of each image")
    parser.add_argument("--batch_size", metavar="N", type=int_at_least(1), default=100, help="images in a batch")
    parser.add_argument("--csv", metavar="FILE", help="write path, class, probability, ... to this file instead")
    args = parser.parse_args(argv)

    target = Path(args.csv) if args.csv else None
    if target and target.is_dir():
        raise UserError(f"--csv {target}: this is a folder; give the name of a file")
    classifier = open_model(Path(args.model))
    files = list(image_files(args.images))
    unreadable: list[Path] = []
    found: list[Prediction] = []
    with quiet(), tqdm(None, "predicting", len(files), unit=" images", leave=False, disable=None) as bar:
        for start in range(0, len(files), args.batch_size):
            batch = files[start : start + args.batch_size]
            new = predict(classifier, batch, args.topk, unreadable)
            found += new
            if new and not target:
                bar.write("\n".join(map(line, new)), file=sys.stdout)
            bar.update(len(batch))
    if not found:
        raise UserError(f"{unreadable[0]}: no image can be read (files: {len(files)})")
    if target:
        write_all({target: table(found)})
        print(f"{len(found)} images: {one_line(target)}")
    if text := accuracy(found, classifier.class_names):
        print(text)
    if unreadable:
        names = ", ".join(one_line(path) for path in unreadable[:NAMED]) + ", ..." * (len(unreadable) > NAMED)
        print(f"lifequant: images that can't be read and are left out: {len(unreadable)} ({names})", file=sys.stderr)
    return 0


def open_model(path: Path) -> Classifier:
    """The model of a run's folder, of a model_best.pt, of a packed file or of an ONNX file. Raises UserError."""
    if path.suffix.lower() == ".onnx":
        return open_onnx(path)
    model = load(path)

    @torch.inference_mode()
    def logits(images: Tensor) -> Tensor:
        return model(normalize(images, model.statistics))

    return Classifier(model.class_names, model.image_size, model.resize, logits)


def open_onnx(path: Path) -> Classifier:
    """An exported model, run by onnxruntime on the CPU. Raises UserError.

    Its input is ``images``, uint8 [n, 3, H, H], its output ``logits``, float32 [n, C], with any n. Its metadata has
    ``class_names``, a JSON list of C texts. It normalizes the images itself.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such model")
    running = session(path, torch.get_num_threads())
    size, resize, names = _contract(path, running)

    def logits(images: Tensor) -> Tensor:
        try:
            (found,) = running.run(["logits"], {"images": images.numpy()})
        except Exception as error:
            raise UserError(f"{path}: onnxruntime can't run it ({short(error)}): export it anew") from None
        if found.shape != (len(images), len(names)):
            raise UserError(
                f"{path}: its logits are {list(found.shape)}, not {[len(images), len(names)]}: export it anew"
            )
        return torch.from_numpy(found)

    return Classifier(names, size, resize, logits)


def _contract(path: Path, running: Any) -> tuple[int, int, list[str]]:
    """(image size, resize, class names) of an ONNX model. Raises UserError for one that is not as ``lifequant export`` writes it."""

    def refuse(why: str) -> UserError:
        return UserError(f"{path}: not as lifequant export writes it: {short(why)}")

    inputs, outputs = (
        [(x.name, x.type, x.shape) for x in put] for put in (running.get_inputs(), running.get_outputs())
    )
    match inputs:
        case [("images", "tensor(uint8)", [free, 3, int(height), int(width)])] if (
            height == width and free.__class__ is not int
        ):
            pass
        case _:
            raise refuse(f"its input is not images, uint8 [n, 3, H, H], but {inputs}")
    metadata = running.get_modelmeta().custom_metadata_map
    try:
        names, resize = (json.loads(metadata.get(*key)) for key in (("class_names", ""), ("resize", str(height))))
    except (ValueError, RecursionError):
        names = resize = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise refuse("its metadata have no class_names, a JSON list of texts")
    if type(resize) is not int or not height <= resize <= 2 * height:
        raise refuse(f"its metadata say resize {resize}, for images of {height} pixels")
    match outputs:
        case [("logits", "tensor(float)", [_, classes])] if classes == len(names) or not isinstance(classes, int):
            return height, resize, names
    raise refuse(f"its output is not logits, float32 [n, {len(names)}], but {outputs}")


def image_files(given: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    """(path, whether it was named itself) of each image; those of a folder sorted. Raises UserError."""
    for path in map(Path, given):
        if path.is_dir():
            found = list(_below(path))
            if not found:
                raise UserError(f"{path}: no images in this folder ({', '.join(EXTENSIONS)})")
            yield from ((image, False) for image in found)
        elif path.exists():
            yield path, True
        else:
            raise UserError(f"{path}: no such file or folder")


def _below(top: Path) -> Iterator[Path]:
    """Files of an image's name or kind in a folder and below it; hidden ones apart. A folder that a link leads to counts once."""
    seen = set()
    for folder, below, names in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and (name.lower().endswith(EXTENSIONS) or is_image(path)):
                yield path


def decoded(files: Sequence[Path], size: int, resize: int) -> list[Tensor | UserError]:
    """uint8 [3, size, size] of each image as a run's evaluation sees it, or why it can't be read."""

    def read(file: Path) -> Tensor | UserError:
        try:
            return as_evaluated(file, size, resize)
        except UserError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the GIL
        return list(pool.map(read, files))


def predict(
    classifier: Classifier, files: Sequence[tuple[Path, bool]], topk: int, unreadable: list[Path]
) -> list[Prediction]:
    """The ``topk`` most probable classes of each image; ``unreadable`` takes those of a folder that can't be read.

    Raises UserError for an image that was named itself and can't be read, and for logits that are not finite.
    """

    images = decoded([path for path, _ in files], classifier.image_size, classifier.resize)
    for (path, named), image in zip(files, images, strict=True):
        if isinstance(image, UserError):
            if named:
                raise image
            unreadable.append(path)
    read_ones = [file for file, image in zip(files, images, strict=True) if torch.is_tensor(image)]
    if not read_ones:
        return []
    logits = classifier.logits(torch.stack([image for image in images if torch.is_tensor(image)]))
    if not logits.isfinite().all():
        raise UserError(
            f"{read_ones[0][0]}, or an image after it: the model's logits are NaN or infinite: use another model"
        )
    tops = logits.double().softmax(1).topk(min(topk, logits.shape[1]))
    return [
        Prediction(path, "" if named else _folder(path), [classifier.class_names[label] for label in labels], shares)
        for (path, named), labels, shares in zip(read_ones, tops.indices.tolist(), tops.values.tolist(), strict=True)
    ]


def _folder(path: Path) -> str:
    return os.path.basename(os.path.dirname(os.path.abspath(path)))


def line(prediction: Prediction) -> str:
    """``cat.png: cat 91.2 %, dog 4.0 %``"""
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return one_line(f"{prediction.path}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in pairs))


def table(found: Sequence[Prediction]) -> bytes:
    """A CSV, a row an image: path, class, probability, class_2, probability_2, ..."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    more = [f"{word}_{place}" for place in range(2, len(found[0].classes) + 1) for word in ("class", "probability")]
    writer.writerow(["path", "class", "probability", *more])
    for one in found:
        pairs = zip(one.classes, one.probabilities, strict=True)
        writer.writerow([one.path, *(cell for name, share in pairs for cell in (name, f"{share:.6f}"))])
    return text.getvalue().encode("utf-8", "surrogateescape")  # a file's name may be any bytes


def accuracy(found: Sequence[Prediction], class_names: Sequence[str]) -> str:
    """A line on the images that lie in folders with names of classes; "" where there are none."""
    known = set(class_names)
    right = [one.classes[0] == one.folder for one in found if one.folder in known]
    if not right:
        return ""
    return (
        f"accuracy: {100 * sum(right) / len(right):.2f} % ({sum(right)} of {len(right)} images in folders of classes)"
    )
