"""Folders of images from public data sets: train/<class>/<file> and test/<class>/<file>, or these in a folder for each domain.

CIFAR-10, CIFAR-100 and scikit-learn's digits become PNGs, numbered in each class in the archive's order. The images of
Office-31, ImageCLEF-DA and Tiny ImageNet are copied as they are. prepared.py says how an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from lifequant.common.arguments import Parser, int_at_least
from lifequant.common.errors import UserError, closest
from lifequant.data.create import image_set, imageclef, office31, prepared, tinyimagenet
from lifequant.data.create.archives import Source
from lifequant.data.create.cifar import read_cifar
from lifequant.data.create.image_set import DOMAINS, ImageSet

CIFAR = {"cifar10": 10, "cifar100": 100}  # name: classes
OFFICIAL = {"office31": office31, "imageclef_da": imageclef, "tinyimagenet": tinyimagenet}
DATASETS = (*CIFAR, "digits", *OFFICIAL)
DOWNLOAD = ".download"


def main_prepare(argv: Sequence[str]) -> int:
    """prepare_images.py. Raises UserError."""
    args = _arguments(argv)
    out = Path(args.out).expanduser()
    reader = OFFICIAL.get(args.dataset)
    tops = args.domains or list(reader.COUNTS if reader else prepared.SPLITS)
    note = prepared.read_note(out, args.dataset, tops)
    if note and not args.source and args.dataset in CIFAR and _is_complete(out, note, args.domains):
        prepared.finish(out, note, "complete already, nothing to do")
    elif reader:
        prepared.write(out, args.dataset, reader.read(Source(args.source), args.seed), note)
    else:
        contents = _image_set(args, out).contents(args.domains, args.seed)
        prepared.write(out, args.dataset, contents, note)
    if (out / DOWNLOAD).is_dir():  # the archive, needed no more
        shutil.rmtree(out / DOWNLOAD)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description="Write images as train/<class>/0001.png and test/<class>/0001.png.")
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="what to write")
    parser.add_argument("--out", required=True, help="folder for train/ and test/, or for a folder of each domain")
    parser.add_argument(
        "--source", help="the official archive, or its unpacked folder (without it, CIFAR is downloaded)"
    )
    parser.add_argument(
        "--domains",
        help=f"of cifar10, cifar100 and digits: the domains to make from the images ({','.join(DOMAINS)})",
    )
    parser.add_argument(
        "--seed", type=int_at_least(0), default=0, help="seed of the choice of test images, and of noise"
    )
    args = parser.parse_args(argv)
    if args.dataset == "digits" and args.source is not None:
        raise UserError("--source: digits come with scikit-learn; leave --source out")
    if args.dataset in OFFICIAL and args.source is None:
        raise UserError(
            f"--source is missing: name the archive of {OFFICIAL[args.dataset].TITLE}, or its unpacked folder"
        )
    if args.dataset in OFFICIAL and args.domains is not None:
        raise UserError(f"--domains: {args.dataset} has what it has; leave --domains out (tasks --domains chooses)")
    args.source = Path(args.source).expanduser() if args.source else None
    if args.domains is not None:
        args.domains = args.domains.split(",")
        for domain in args.domains:
            if domain not in DOMAINS or args.domains.count(domain) > 1:
                why = (
                    "is there twice"
                    if domain in DOMAINS
                    else f"is none of {', '.join(DOMAINS)}{closest(domain, DOMAINS)}"
                )
                raise UserError(f"--domains: {domain!r} {why}")
    return args


def _is_complete(out: Path, note: prepared.Note, domains: list[str] | None) -> bool:
    """Whether ``out`` has all that its note says, and whether that is what is asked for now."""
    parts = {f"{domain}/{split}" for domain in domains for split in prepared.SPLITS} if domains else {*prepared.SPLITS}
    files = prepared.numbered(note["classes"], note["counts"])
    return note["counts"].keys() == parts and not prepared.missing(out, note["dataset"], files)


def _image_set(args: argparse.Namespace, out: Path) -> ImageSet:
    if args.dataset == "digits":
        return image_set.digits(args.seed)
    if args.domains and args.source and (args.source / "train").is_dir() and (args.source / "test").is_dir():
        return image_set.read_folder(args.source, CIFAR[args.dataset])
    return ImageSet(*read_cifar(args.dataset, args.source, out / DOWNLOAD))
