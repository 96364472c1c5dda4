"""Images that others wrote: they are decoded as a person would see them, or one line says what is wrong."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.hostile import changed_bytes, few, loads_or_refuses, refused
from support.tiny import SIDE

from lifequant.data.decode import MOST_PIXELS, decode, quiet


def png(tmp_path: Path, image: Image.Image, kind: str = "PNG", **more) -> Path:
    image.save(tmp_path / "image", kind, **more)
    return tmp_path / "image"


def grey(maximum: int = 255, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, maximum, (SIDE, SIDE), endpoint=True).astype(dtype)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits(kind, tmp_path):
    """v * 255 / 65535, rounded: white stays white, and nothing is clipped."""
    values = grey(65535, np.uint16)
    values[0, :2] = 0, 65535
    found, done = decode(png(tmp_path, Image.fromarray(values), kind), SIDE)
    assert (found.numpy() == np.rint(values / 257)).all() and done.endswith("to RGB")


def test_other_modes(tmp_path):
    colors = Image.fromarray(np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    for mode, kind in (("CMYK", "TIFF"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("1", "PNG")):
        image = colors.convert(mode)
        found, done = decode(png(tmp_path, image, kind), SIDE)
        assert (found.numpy() == np.asarray(image.convert("RGB")).transpose(2, 0, 1)).all() and done == f"{mode} to RGB"
    palette = colors.convert("P")
    found, _ = decode(png(tmp_path, palette, transparency=0), SIDE)
    assert (found.numpy() == np.asarray(palette.convert("RGB")).transpose(2, 0, 1)).all()
    refused(lambda: decode(png(tmp_path, Image.fromarray(grey().astype(np.float32)), "TIFF"), SIDE), "white is unknown")


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif(turn, tmp_path):
    """As Pillow's own exif_transpose, which is the independent reader here."""
    exif = Image.Exif()
    exif[0x0112] = turn
    path = png(tmp_path, Image.fromarray(np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3)), exif=exif)
    found, done = decode(path, SIDE)
    assert (found.numpy() == np.asarray(ImageOps.exif_transpose(Image.open(path))).transpose(2, 0, 1)).all()
    assert done == (None if turn == 1 else "turned as EXIF says")


def test_first_of_several(tmp_path):
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        more = {"lossless": True} if kind == "WEBP" else {}
        found, _ = decode(png(tmp_path, frames[0], kind, save_all=True, append_images=frames[1:], **more), SIDE)
        assert found.flatten(1)[:, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (20_000, 1), (1, 20_000)])
def test_odd_shapes(shape, tmp_path):
    found, _ = decode(png(tmp_path, Image.new("RGB", shape, (9, 8, 7))), SIDE)
    assert (found == torch.tensor([9, 8, 7])[:, None, None]).all()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    small = io.BytesIO()
    Image.new("L", (1, 1)).save(small, "PNG")
    content = bytearray(small.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def test_images_that_are_refused(tmp_path):
    path = tmp_path / "0001.png"
    whole = png(tmp_path, Image.fromarray(grey())).read_bytes()
    eps = png(tmp_path, Image.new("RGB", (4, 4)), "EPS").read_bytes()
    contents = [b"", b"text", whole[:-30], whole[:40], eps, b"\x80\x04pickle.", bomb(9000, 8000), bomb(2**30, 2**30)]
    for content, word in zip(contents, ["none of PNG", "none of PNG", "", "", "none of PNG", "none of PNG", "9000x8000", str(MOST_PIXELS)],
                             strict=True):  # fmt: skip
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused(lambda: decode(path, SIDE), "0001.png", word)
    path.unlink()
    refused(lambda: decode(path, SIDE), "No such file")
    os.mkfifo(path)
    refused(lambda: decode(path, SIDE), "not a regular file")
    path.unlink()
    path.mkdir()
    refused(lambda: decode(path, SIDE), "not a regular file")


FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "TGA": ("RGB",),  # not admitted
    "EPS": ("RGB",),  # not admitted: Pillow would start a program
}


def content(kind: str, mode: str) -> bytes:
    """A small image, turned as EXIF says where the format has EXIF, of three frames where it has frames."""
    image = Image.fromarray(grey(65535, np.uint16)) if mode == "I;16" else Image.fromarray(grey()).convert(mode)
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    more = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    more |= {"save_all": True, "append_images": [image] * 2} if kind in ("GIF", "TIFF", "WEBP") else {}
    image.save(out, kind, **more)
    return out.getvalue()


@few
@given(
    st.sampled_from([content(kind, mode) for kind, modes in FORMATS.items() for mode in modes]).flatmap(changed_bytes)
)
def test_bytes_that_pillow_stumbles_over(tmp_path, changed):
    (tmp_path / "image").write_bytes(changed)
    with quiet():
        loads_or_refuses(lambda: decode(tmp_path / "image", 32))
