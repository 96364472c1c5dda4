"""Where a folder is looked for, which names are admitted, and how files are written: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from lifequant.common.errors import UserError, one_line

_PARENT = Path(__file__).resolve().parents[2]
TOP = _PARENT if (_PARENT / "pyproject.toml").is_file() else None  # top of the clone; None in an installed wheel


def candidates(folder: str) -> list[Path]:
    """Where ``folder`` is looked for: in the caller's folder, then at the clone's top, each with and without src/."""
    given = Path(folder).expanduser()
    if given.is_absolute():
        return [given]
    parts = given.parts
    other = Path(*parts[1:]) if parts[:1] == ("src",) else Path("src", *parts)
    bases = [Path.cwd()] + ([TOP] if TOP else [])
    return list(dict.fromkeys(base / relative for base in bases for relative in (given, other)))


def find_folder(folder: str, flag: str, remedy: str) -> Path:
    """The first of ``candidates(folder)`` that exists, resolved. Raises UserError that names all, and the remedy."""
    tried = candidates(folder)
    for path in tried:
        if path.is_dir():
            found = path.resolve()
            if not any("\ud800" <= c <= "\udfff" for c in str(found)):
                return found
            raise UserError(
                f"{flag} {found}: this path is not UTF-8, so no dataset.json could name it; rename the folder"
            )
    raise UserError(f"{flag} {folder}: no such folder (tried {', '.join(map(str, tried))}); {remedy}")


def prepare_command(name: str, folder: str) -> str:
    """The command that makes the images of the data set ``name``, where ``candidates(folder)`` will find them."""
    known = ("cifar10", "cifar100", "digits")
    dataset = name if name in known else "|".join(known)
    script = Path("lifelong_data_generation", "prepare_images.py")
    given = Path(folder).expanduser()
    relative = Path(*given.parts[1:]) if given.parts[:1] == ("src",) else given
    out = os.path.relpath((TOP or Path.cwd()) / relative)
    return f"python {os.path.relpath(TOP / script) if TOP else script} --dataset {dataset} --out {out}"


def checked_name(name: str, folder: Path) -> str:
    """``name`` of a class or an image in ``folder``, if it can stand in a CSV and on a terminal; raises UserError."""
    bad = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)  # Cs: bytes that aren't UTF-8
    if bad or name in ("", ".", "..") or "/" in name:
        raise UserError(f"{folder}: the name '{one_line(name)}' is not plain UTF-8 text: rename it")
    return name


def sync_folder(folder: Path) -> None:
    """What was renamed in ``folder`` outlives a loss of power; nothing where the system can't promise that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_all(files: Mapping[Path, str | bytes]) -> None:
    """Write all files, in this order, each by a temporary file that replaces it, once all contents are on disk.

    What goes wrong (a full disk) leaves every file as it was.
    """
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary[path].open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
        for folder in {path.parent for path in files}:
            sync_folder(folder)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
