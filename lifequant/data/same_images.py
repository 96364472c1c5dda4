"""Which image a path in a CSV means. Images are compared by their files: ``./a``, ``a//b``, links, other Unicode normal forms
of a name and backslashes are other spellings of one image, so no test image is trained on and none has two labels."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from unicodedata import normalize

from lifequant.common.errors import UserError
from lifequant.common.safe_files import short
from lifequant.data.task_csv import Rows, csv_name, leaves_root, plain

Tables = dict[tuple[str, int], Rows]  # (train or test, task): the rows of its CSV
_KINDS = {"train": "training", "test": "test"}


class ImageFiles:
    """The files below an image root. Nothing is opened, and whether a path stays inside the root is checked elsewhere."""

    def __init__(self, root: Path) -> None:
        self.top = f"{root}{os.sep}"
        self._real: dict[str, str] = {}  # folder: its path without links
        self._names: dict[str, dict[str, str]] = {}  # folder: names in it by their normal form

    def key(self, path: str) -> Hashable | None:
        """What all spellings of one file have in common; None where there is no such file.

        It is the path without links. Hard links share their device and number instead.
        """
        try:
            status = os.lstat(self.top + path)
            if stat.S_ISLNK(status.st_mode):
                real = os.path.realpath(self.top + path)
                status = os.stat(real)
            else:
                folder, _, name = path.rpartition("/")
                real = f"{self.real(folder)}{os.sep}{name}"
        except (OSError, ValueError):  # ValueError: a NUL, or a character that this system's file names can't have
            return None
        if status.st_nlink > 1 and status.st_ino and stat.S_ISREG(status.st_mode):
            return status.st_dev, status.st_ino
        return _composed(real)

    def real(self, folder: str) -> str:
        """The path of a folder without links."""
        if folder not in self._real:
            self._real[folder] = os.path.realpath(self.top + folder)
        return self._real[folder]

    def find(self, path: str) -> tuple[str, Hashable]:
        """(the spelling by which the file can be opened, its key). A path that means no file is its own spelling."""
        key = self.key(path)
        if key is not None:
            return path, key
        slashes = path.replace("\\", "/")
        for other in dict.fromkeys((slashes, slashes.strip(" \t\"'"))):
            other = other if other.isascii() else self._present(other)
            if other != path and not leaves_root(other) and (key := self.key(other)) is not None:
                return other, key
        return path, _composed(plain(slashes))

    def _present(self, path: str) -> str:
        """``path``, each name of it in the Unicode normal form that the folder has."""
        done = ""
        for name in path.split("/"):
            if not name.isascii() and not os.path.lexists(f"{self.top}{done}{name}"):
                name = self._names_in(done).get(_composed(name), name)
            done += f"{name}/"
        return done[:-1]

    def _names_in(self, folder: str) -> dict[str, str]:
        if folder not in self._names:
            self._names[folder] = {}
            with suppress(OSError, ValueError):
                self._names[folder] = {_composed(name): name for name in sorted(os.listdir(self.top + folder))}
        return self._names[folder]


def _composed(text: str) -> str:
    return text if text.isascii() else normalize("NFC", text)


class Spellings:
    """One spelling for each image of the CSVs: the one that they have, the first by the alphabet where they have several.

    ``tables`` are the CSVs in ``folder``, as written; the attribute of that name has them with that spelling. Raises
    UserError for an image that is trained on and tested on, that has two labels, or that a CSV names twice. ``say`` is told
    of links to images that the same CSV has: they are left out.
    """

    def __init__(self, root: Path, tables: Tables, folder: Path, prefix: str, say: Callable[[str], None]) -> None:
        self.tables = tables
        self._files = ImageFiles(root)
        self._found = {image: self._files.find(image) for rows in tables.values() for image, _ in rows}
        self._chosen: dict[Hashable, str] = {}
        for spelling, key in self._found.values():
            self._chosen[key] = min(self._chosen.get(key, spelling), spelling)
        if len(self._chosen) == len(self._found) and all(image == found[0] for image, found in self._found.items()):
            return
        self.tables = {}
        self._first: dict[Hashable, tuple[str, str, int]] = {}
        left = 0
        for (kind, task), rows in tables.items():
            self.tables[kind, task] = self._checked(rows, kind, folder / csv_name(prefix, kind, task))
            left += len(rows) - len(self.tables[kind, task])
        if left:
            say(f"{left} rows of the CSVs name an image by a second name (a link); each image is taken once")

    def of(self, image: str) -> str:
        """The one spelling of an image, which another CSV may write otherwise."""
        _, key = self._found.get(image) or self._files.find(image)
        return self._chosen.get(key, image)

    def _checked(self, rows: Rows, kind: str, file: Path) -> Rows:
        here: dict[Hashable, str] = {}
        written: dict[str, str] = {}
        for image, label in rows:
            spelling, key = self._found[image]
            other, its_kind, its_label = self._first.setdefault(key, (image, kind, label))
            same = f"{file}: {short(image)} is the same image as {short(other)}"
            if its_kind != kind:
                raise UserError(
                    f"{same}, which is in a {_KINDS[its_kind]} CSV: an image is for training or for testing"
                )
            if its_label != label:
                raise UserError(f"{same}, but has the label {label}, not {its_label}: give it one label")
            if (before := written.setdefault(plain(spelling), image)) != image:
                raise UserError(
                    f"{file}: {short(before)} and {short(image)} are the same image: it is there more than once"
                )
            here.setdefault(key, image)
        return [(self._chosen[key], label) for image, label in rows if here[key := self._found[image][1]] == image]
