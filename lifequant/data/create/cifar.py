"""CIFAR-10 and CIFAR-100, downloaded, unpacked and read by torchvision.

torchvision unpickles the files. A pickle can run code, so only the official files are read: their MD5 sums, which
torchvision lists, are compared before anything is unpacked or unpickled.
"""

from __future__ import annotations

import http.client
import socket
import tempfile
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np

from lifequant.common.errors import UserError


def read_cifar(
    dataset: str, source: Path | None, download: Path
) -> tuple[str, list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Origin, class names, and for train and test the images (N, 32, 32, 3) uint8 and labels (N,), in archive order.

    ``source`` is the archive, a folder that has it, or its unpacked folder. None downloads the archive to the folder
    ``download``. Raises UserError for files that are not the official ones.
    """
    from torchvision.datasets import CIFAR10, CIFAR100  # torchvision takes seconds to import
    from torchvision.datasets.utils import check_integrity, extract_archive

    official = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    archive = _download(official, download) if source is None else source
    if (archive / official.filename).is_file():
        archive /= official.filename
    hint = f"give {official.filename} from {official.url}, the folder that has it, or {official.base_folder}"
    with tempfile.TemporaryDirectory() as scratch:
        if archive.is_file():
            if not check_integrity(archive, official.tgz_md5):
                raise UserError(f"--source {archive}: damaged, or not the official archive (its MD5 differs); {hint}")
            extract_archive(archive, scratch)
            root = scratch
        elif archive.is_dir():
            root = archive.parent if archive.resolve().name == official.base_folder else archive
        else:
            raise UserError(f"--source {archive}: no such file or folder; {hint}")
        try:
            parts = {"train": official(root, train=True), "test": official(root, train=False)}
        except RuntimeError:  # torchvision's word for a missing file and for a wrong MD5
            raise UserError(
                f"--source {archive}: a file is missing in it, damaged, or not the official one; {hint}"
            ) from None
    images = {split: part.data for split, part in parts.items()}
    labels = {split: np.array(part.targets, dtype=np.int64) for split, part in parts.items()}
    return "official archive", parts["train"].classes, images, labels


def _download(official: Any, folder: Path) -> Path:
    """Download the archive to ``folder`` and check its MD5. One that is there already is not downloaded again."""
    from torchvision.datasets.utils import download_url

    is_new = not folder.parent.exists()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer; torchvision sets none and would wait forever
    try:
        download_url(official.url, folder, official.filename, official.tgz_md5)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            if is_new:
                folder.parent.rmdir()
        raise UserError(
            f"{official.url} can't be downloaded ({error}): get {official.filename} on a machine with a network "
            f"and name it by --source"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    return folder / official.filename
