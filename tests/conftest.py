"""Shared by all tests: nothing is written to the user's folders, and one tiny data set is made once."""

import os
import shutil
import tempfile

import pytest
from support.tiny import Tiny, write_csvs, write_images

# Before torch is imported: on tiny tensors threads only wait for each other, for minutes where others use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from lifequant.common import text
from lifequant.runtime import log


@pytest.fixture(scope="session", autouse=True)
def own_cache():
    """Decoded images are cached in a temporary folder, also by processes that a test starts."""
    folder, former = tempfile.mkdtemp(prefix="lifequant-cache-"), os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = folder
    yield
    shutil.rmtree(folder, ignore_errors=True)
    os.environ.pop("XDG_CACHE_HOME")
    if former is not None:
        os.environ["XDG_CACHE_HOME"] = former


@pytest.fixture(autouse=True)
def whole_lines(request, monkeypatch):
    """What a run says is not folded, since where depends on the length of a temporary folder's name; NARROW = True folds."""
    if not getattr(request.module, "NARROW", False):
        for module in (text, log):
            monkeypatch.setattr(module, "wrapped", lambda line, **_: line)


@pytest.fixture(scope="module")
def no_fsync():
    """Thousands of small files take seconds with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """Six classes of eight training and four test images; see tiny.py."""
    top = tmp_path_factory.mktemp("tiny")
    images = write_images(top / "images")
    return Tiny(images, write_csvs(images, top / "csvs"), write_csvs(images, top / "csvs3", num_tasks=3, rate=25))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Tiny:
    """Photographs of several kinds and sizes; see photographs.py."""
    from support.photographs import write_photographs

    return write_photographs(tmp_path_factory.mktemp("photos"))
