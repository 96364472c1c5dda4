"""Write a trained network as an ONNX file that onnxruntime runs on integer kernels, or as packed bytes, and check it.

lifequant export experiment/ours                         # ONNX, 8-bit integer arithmetic throughout: the fastest
lifequant export experiment/ours --integer exact         # ONNX, the predictions of the network
lifequant export experiment/ours --weights int4          # ONNX, a small file that runs in float
lifequant export experiment/ours --format packed         # safetensors, for lifequant.load and lifequant predict

Both networks see the run's test images, and what differs is printed. A file that differs too much is not written (exit code 1):
exact must give 99.9 % equal predictions, fast may lose 0.3 points of top-1, the packed file must give equal logits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lifequant.checkpointing import checkpoint
from lifequant.checkpointing.packed import load_packed, write_packed
from lifequant.common.arguments import Parser, int_at_least
from lifequant.common.errors import UserError
from lifequant.common.text import say
from lifequant.data.augment import normalize
from lifequant.exporting import run, trained
from lifequant.exporting.parity import Parity, compare
from lifequant.exporting.trained import Images, Trained
from lifequant.qat.layers import fake_quants
from lifequant.qat.packing import packed_model_bytes

if TYPE_CHECKING:
    from lifequant.exporting.onnx_file import OnnxFile

BATCH = 100
DEFAULT_FORM = {"int8": "fast", "int4": "exact"}  # INT4 weights run in float, where rounding more gains nothing


def main(argv: Sequence[str]) -> int:
    """Exit code 1 where the file is not as good as the network. Raises UserError."""
    args = _parser().parse_args(argv)
    if args.format == "packed" and (args.integer or args.weights):
        raise UserError("--integer and --weights are of --format onnx: the packed file has the codes themselves")
    run.needed("safetensors") if args.format == "packed" else run.needed("onnx", "onnxruntime", "onnxscript", "torch")
    source = trained.load_trained(Path(args.run), args.task)
    out = Path(args.out or source.folder / _file_name(args))
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(
            f"--out {out}: {'that is a folder' if out.is_dir() else 'its folder is not there'}: name a file"
        )
    images = images_of(source, args.images)
    say(f"{source.path}: the network and its file will see {len(images.test)} {images.name}")
    return _packed(source, images, out) if args.format == "packed" else _onnx(args, source, images, out)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a job_dir or a model file")
    parser.add_argument("--format", choices=["onnx", "packed"], default="onnx", help="onnx (default) or packed")
    parser.add_argument(
        "--integer",
        choices=["fast", "exact"],
        help="fast (default): what training left in float has 8 bits; exact (default of int4): nothing is rounded that "
        "training did not round",
    )
    parser.add_argument("--weights", choices=["int8", "int4"], help="how the ONNX file stores weights of 4 bits and less:"
                        " int8 (default) runs on integer kernels, int4 is small and runs in float")  # fmt: skip
    parser.add_argument(
        "--task", type=int_at_least(0), metavar="T", help="the network as it was after task T (default: the last)"
    )
    parser.add_argument("--out", metavar="FILE", help="default: model.onnx, or a name of its kind, in the run's folder")
    parser.add_argument(
        "--images", metavar="DIR", help="check with these images (in class folders, for accuracies), not the run's"
    )
    return parser


def _form(args: argparse.Namespace) -> tuple[str, str]:
    """(``--integer``, ``--weights``)"""
    weights = args.weights or "int8"
    return args.integer or DEFAULT_FORM[weights], weights


def _file_name(args: argparse.Namespace) -> str:
    if args.format == "packed":
        return "model.safetensors"
    form, weights = _form(args)
    kinds = [form] * (form != DEFAULT_FORM[weights]) + [weights] * (weights != "int8")
    return "_".join(["model", *kinds]) + ".onnx"


def images_of(source: Trained, folder: str | None) -> Images:
    """Those of a folder, or the run's, or random ones where these can't be had."""
    if folder:
        return trained.images_of_folder(folder, source)
    try:
        return trained.images_of_run(source)
    except UserError as error:
        say(f"the run's images can't be had ({error}), so random ones are taken: --images names others")
        return trained.random_images(source)


def check_onnx(source: Trained, images: Images, form: str, weights: str) -> tuple[OnnxFile, Parity]:
    """The network as an ONNX file, and how it compares on the images."""
    from lifequant.exporting.onnx_file import make_onnx

    calibration = [batch.numpy() for batch in images.calibration.split(BATCH)]
    made = make_onnx(source.model, images.test[:2], form, weights, calibration, source.facts(), from_bytes=True)
    theirs = run.outputs(made.content, (batch.numpy() for batch in images.test.split(BATCH)))
    return made, compare(np.concatenate(list(_logits(source.model, images.test))), theirs, images.labels)


def _onnx(args: argparse.Namespace, source: Trained, images: Images, out: Path) -> int:
    form, weights = _form(args)
    if not any(True for _ in fake_quants(source.model)):
        say("the network has 32 bits, so the file is a float one")
        form = "exact"
    made, parity = check_onnx(source, images, form, weights)
    for note in made.notes:
        say(note)
    whole, in_float = run.convolutions(run.kernels(made.content))
    say(f"{form}, {weights}: onnxruntime computes {whole} convolutions in integers and {in_float} in float")
    return _decide(parity, parity.failure(form), images, out, made.content)


def _packed(source: Trained, images: Images, out: Path) -> int:
    if source.config is None:
        raise UserError(f"{source.path} is packed already")
    facts = {name: value for name, value in source.facts().items() if name in ("method", "tasks", "accuracy")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        write_packed(file, source.model, source.config, source.model.class_names, **facts)
        loaded, content = load_packed(file).model.eval(), file.read_bytes()
    network, theirs = (np.concatenate(list(_logits(model, images.test))) for model in (source.model, loaded))
    failure = "" if np.array_equal(network, theirs) else "its logits are not those of the network"
    say(f"the network takes {packed_model_bytes(source.model):,} bytes, the rest of the file is its description")
    return _decide(compare(network, theirs, images.labels), failure, images, out, content)


def _logits(model: torch.nn.Module, pixels: Tensor) -> Iterator[np.ndarray]:
    with torch.inference_mode():
        for batch in pixels.split(BATCH):
            yield model(normalize(batch, model.statistics)).numpy()


def _decide(parity: Parity, failure: str, images: Images, out: Path, content: bytes) -> int:
    """Write the file if it is as good as the network; the exit code."""
    say(f"{parity.images} {images.name}: {parity}")
    if failure:
        print(f"lifequant: error: {out} is not written: {failure}", file=sys.stderr)
        return 1
    if excuse := parity.excuse():
        say(excuse)
    checkpoint.write_bytes(out, content)
    say(f"wrote {out} ({len(content):,} bytes)")
    return 0
