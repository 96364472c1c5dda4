"""Small archives with Office-31's layout."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

from PIL import Image

from lifequant.data.create import office31

FEW = {"amazon": 6, "webcam": 5, "dslr": 2}  # images a class


def jpeg(*color: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), tuple(c % 256 for c in color)).save(out, "JPEG", quality=50)
    return out.getvalue()


def office(
    images: str = "images/", classes: list[str] = office31.CLASSES, few: dict[str, int] = FEW
) -> dict[str, bytes]:
    """{name in the archive: content}"""
    return {
        f"{domain}/{images}{name}/frame_{number:04d}.jpg": jpeg(8 * label, 40 * number, len(domain))
        for domain, n in few.items()
        for label, name in enumerate(classes)
        for number in range(1, n + 1)
    }


def as_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def as_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path
