"""The files of an archive (.zip, .tar, .tar.gz) or of a folder. An archive is never unpacked: its files are read one by one."""

from __future__ import annotations

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from lifequant.common.errors import UserError
from lifequant.common.safe_files import open_regular, short
from lifequant.data.task_csv import leaves_root

_MOST_BYTES = 2**28  # of a file; a photograph has less than a tenth of it
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
)  # the last: a password


class Source:
    """The regular files below ``path``: ``sizes`` is {name with /: bytes}. Links in an archive are left out.

    Raises UserError for what is neither an archive nor a folder, for a damaged archive, and for one whose names lead out of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise UserError(f"--source {path}: no such file or folder")
        self.sizes = {name: size for name, size, _ in self._entries(())}

    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of these files, in the order in which they lie there."""
        return ((name, content) for name, _, content in self._entries(names) if content is not None)

    def text(self, name: str) -> str:
        """The content of a small text file."""
        try:
            return dict(self.contents([name]))[name].decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"--source {self.path}: {short(name)} is not UTF-8 text") from None

    def _entries(self, wanted: Collection[str]) -> Iterator[tuple[str, int, bytes | None]]:
        """(name, bytes, content or None where it is not wanted) of each file."""
        try:
            for given, size, read in (_folder if self.path.is_dir() else _archive)(self.path):
                name = given.replace("\\", "/")
                if leaves_root(name):
                    raise UserError(
                        f"--source {self.path}: it names {short(given)!r}, a path outside of it: not the official archive"
                    )
                name = "/".join(part for part in name.split("/") if part not in ("", "."))
                if size > _MOST_BYTES and name in wanted:
                    raise UserError(
                        f"--source {self.path}: {short(name)} has {size} bytes, more than any image: remove it"
                    )
                yield name, size, read() if name in wanted else None
        except OSError as error:
            if error.errno is not None:  # no permission and the like; a broken gzip has no number
                raise
            raise self._damaged() from None
        except _BROKEN:
            raise self._damaged() from None

    def _damaged(self) -> UserError:
        return UserError(
            f"--source {self.path}: damaged, or no .zip, .tar or .tar.gz: download it again, or name its unpacked folder"
        )


def _folder(path: Path) -> Iterator[tuple]:
    """Links to folders are followed, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for file in sorted(files):
            full = Path(folder, file)
            if full.is_file():
                yield full.relative_to(path).as_posix(), full.stat().st_size, lambda full=full: _content(full)


def _content(path: Path) -> bytes:
    with open_regular(path, _MOST_BYTES) as file:
        return file.read()


def _archive(path: Path) -> Iterator[tuple]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, entry.file_size, lambda entry=entry: archive.read(entry)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isreg():
                yield member.name, member.size, lambda member=member: archive.extractfile(member).read()
