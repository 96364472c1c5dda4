"""CIFAR-10 and CIFAR-100 from their pickled archive: torchvision downloads it and knows its checksums; we read it.

Nothing is unpacked to disk, and the unpickler admits numbers, texts and arrays alone, so an archive from elsewhere
can't run code or write files.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import pickle
import socket
import sys
import tarfile
import urllib.error
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lifequant.common.errors import UserError, one_line

LIMIT = 2**28  # bytes; the largest file of either archive has 155 million


def read_cifar(
    dataset: str, source: Path | None, download: Path
) -> tuple[str, list[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Origin, class names, and for train and test the images (N, 32, 32, 3) uint8 and labels (N,), in archive order.

    ``source`` is the archive, a folder that has it, or its unpacked files; None downloads it to folder ``download``.
    Content that differs from the official one is read with a warning. Raises UserError.
    """
    from torchvision.datasets import CIFAR10, CIFAR100  # takes seconds, so only where it is needed

    official = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    if source is None:
        source = _download(official, download)
    sums = {name: md5 for name, md5 in official.train_list + official.test_list}
    sums[official.meta["filename"]] = official.meta["md5"]
    files = _files(source, sums, official)
    found_sums = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in files.items()}
    origin = "official archive"
    if found_sums != sums:
        print(f"warning: {one_line(source)} is not the official archive (checksums differ); going on", file=sys.stderr)
        joined = "".join(found_sums[name] for name in sums)
        origin = "archive " + hashlib.md5(joined.encode(), usedforsecurity=False).hexdigest()

    names = _loads(files, official.meta["filename"], source).get(official.meta["key"])
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{source}: {official.meta['filename']} has no list {official.meta['key']}")
    parts = {
        split: [_batch(_loads(files, name, source), len(names), f"{source}: {name}") for name, _ in listed]
        for split, listed in (("train", official.train_list), ("test", official.test_list))
    }
    images = {split: np.concatenate([x for x, _ in batches]) for split, batches in parts.items()}
    labels = {split: np.concatenate([y for _, y in batches]) for split, batches in parts.items()}
    return origin, names, images, labels


def _download(official: Any, folder: Path) -> Path:
    """The archive in ``folder``, its checksum checked; one that is there already is not downloaded again."""
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


def _files(source: Path, wanted: Collection[str], official: Any) -> dict[str, bytes]:
    """The content of the ``wanted`` files, from the archive or from the folder they were unpacked to."""
    hint = f"give {official.filename}, the folder that has it, or {official.base_folder}"
    if source.is_dir():
        if (source / official.filename).is_file():
            return _files(source / official.filename, wanted, official)
        folder = source / official.base_folder if (source / official.base_folder).is_dir() else source
        found = {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}
    elif source.is_file():
        try:
            with tarfile.open(source) as tar:
                found = {}
                for member in tar:  # in the archive's order: going back would decompress all of it again
                    name = PurePosixPath(member.name).name
                    if name in wanted and member.isfile() and member.size <= LIMIT:
                        found[name] = tar.extractfile(member).read()
        except (tarfile.TarError, EOFError, ValueError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            why = str(error).split("\n")[0].rstrip(":")  # what each kind of compression says follows
            raise UserError(f"--source {source}: damaged, or not a tar archive ({why}); {hint}") from None
    else:
        raise UserError(f"--source {source}: no such file or folder; {hint}")
    lacking = [name for name in wanted if name not in found]
    if lacking:
        raise UserError(f"--source {source}: no {', '.join(lacking)} in it; {hint}")
    return found


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """Stands for numpy's ``_reconstruct``: the pickle sets shape, type and content afterwards."""
    return np.empty(0, np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode``, by which Python 3 writes bytes at protocol 2."""
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Admits what an array of numbers is made of, and nothing else that could be called."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return _empty_array
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case "_codecs", "encode":
                return _latin1
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which image data don't need")


def _loads(files: dict[str, bytes], name: str, source: Path) -> dict[str, Any]:
    try:
        content = _Unpickler(io.BytesIO(files[name]), encoding="latin1").load()  # written by Python 2
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{source}: {name} can't be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: {name} is not a dictionary")
    return content


def _batch(content: dict[str, Any], num_classes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one file; a row of its data is the red, green and blue plane of a 32x32 image."""
    data = content.get("data")
    labels = content.get("labels", content.get("fine_labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise UserError(f"{where}: its data are not bytes of N x 3072")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise UserError(f"{where}: not one label an image")
    if not all(isinstance(label, int) and 0 <= label < num_classes for label in labels):
        raise UserError(f"{where}: a label that is not 0 to {num_classes - 1}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)
