"""One image file, written by anybody -> pixels. Only formats of pictures are decoded, and only up to a size."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lifequant.common.errors import UserError
from lifequant.common.safe_files import open_regular, short

T = TypeVar("T")

# Pillow knows many more, some of which start other programs (EPS: ghostscript) or are hardly ever tested.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
MOST_PIXELS = (
    2**26
)  # 67 million, 0.3 GB decoded; the largest image of ImageNet has 61 million. Pillow warns at 89 million
_MOST_BYTES = 2**28  # of a file
_LARGE = (
    2**23
)  # pixels; images above it are decoded one at a time, so that memory holds a few small ones or one of these
_one_at_a_time = threading.Lock()

_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """(the image in RGB, what had to be done to make it so).

    Turned as its EXIF says; 16 bits are scaled to 8; transparency is dropped, as by torchvision's ImageFolder. Raises
    UserError for pixels that have no known white.
    """
    done = []
    turn = _TURNS.get(_orientation(image))
    if turn is not None:  # one of them is 0
        image = image.transpose(turn)
        done.append("turned as EXIF says")
    if image.mode != "RGB":
        done.append(f"{image.mode} to RGB")
        image = (_eight_bits(image) if image.mode[0] in "IF" else image).convert("RGB")
    return image, done


def as_pixels(image: Image.Image, size: int) -> tuple[Tensor, str | None]:
    """(uint8 [3, size, size], what had to be done to make it so or None): ``upright``, and the middle of what isn't square."""
    image, done = upright(image)
    width, height = image.size
    if (width, height) != (size, size):
        done.append(f"scaled to {size}x{size}" if width == height else f"scaled, and the middle cut to {size}x{size}")
        short_side = min(width, height)
        left, top = (width - short_side) // 2, (height - short_side) // 2
        box = (left, top, left + short_side, top + short_side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(image).transpose(2, 0, 1)), " and ".join(done) or None


def _orientation(image: Image.Image) -> object:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever Pillow makes of a broken block: it says nothing on how to turn the image
        return 1
    return found if isinstance(found, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of 16 bits of gray (which convert() would clip to white): v * 255 / 65535, rounded."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise UserError(f"an image of mode {image.mode} whose white is unknown: save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def decode(path: Path, size: int, content: np.ndarray | None = None) -> tuple[Tensor, str | None]:
    """``as_pixels`` of a file (the first picture of several), or of the bytes that it has (uint8 [n]).

    Raises UserError for what is no whole image.
    """

    def pixels(image: Image.Image) -> tuple[Tensor, str | None]:
        image.load()
        return as_pixels(image, size)

    return _with_image(path, content, pixels)


def decode_whole(path: Path, content: np.ndarray | None = None) -> tuple[np.ndarray, str | None]:
    """(uint8 [H, W, 3], what had to be done or None): all pixels of a file's image, ``upright``. Raises UserError as ``decode``.

    torchvision decodes most JPEGs, which saves a third of the time; its pixels are Pillow's, bit for bit.
    """
    content = read_file(path) if content is None else content

    def pixels(image: Image.Image) -> tuple[np.ndarray, str | None]:
        found = None
        if image.format == "JPEG" and image.mode == "RGB" and _orientation(image) not in _TURNS:
            found = _by_torchvision(content)
        if found is not None:
            return found, None
        image.load()
        image, done = upright(image)
        return np.array(image), " and ".join(done) or None

    return _with_image(path, content, pixels)


def _by_torchvision(content: np.ndarray) -> np.ndarray | None:
    """uint8 [H, W, 3] of a JPEG's bytes; None where torchvision can't, so that Pillow says what is wrong."""
    try:
        # It takes a second, which runs of small images needn't wait for. Releases after 0.29 may have it no more.
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(torch.from_numpy(content), ImageReadMode.RGB).permute(1, 2, 0).numpy()
    except (ImportError, RuntimeError):
        return None


def read_file(path: Path) -> np.ndarray:
    """The bytes of an image's file, uint8 [n]. Raises UserError."""
    try:
        with open_regular(path, _MOST_BYTES) as file:
            return np.fromfile(file, np.uint8)
    except OSError as error:  # gone, or not to be read by this user
        raise _unreadable(path, error) from None


def _with_image(path: Path, content: np.ndarray | None, work: Callable[[Image.Image], T]) -> T:
    """``work(image)`` of a file that is open, or of its bytes. Raises UserError for what is no whole image."""
    try:
        with (
            open_regular(path, _MOST_BYTES) if content is None else io.BytesIO(content) as file,
            _opened(path, file) as image,
        ):
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise UserError(
                    f"{path}: {width}x{height} pixels, more than the {MOST_PIXELS} that are decoded: scale it"
                )
            with _one_at_a_time if width * height > _LARGE else nullcontext():
                return _guarded(path, lambda: work(image))
    except OSError as error:  # gone, or not to be read by this user
        raise _unreadable(path, error) from None


def is_image(path: Path) -> bool:
    """Whether a file begins as an image does. Its pixels are not read."""
    try:
        with quiet(), open_regular(path, _MOST_BYTES) as file, _opened(path, file):
            return True
    except (OSError, UserError):
        return False


def _opened(path: Path, file: BinaryIO) -> Image.Image:
    return _guarded(path, lambda: Image.open(file, formats=FORMATS))


def _guarded(path: Path, work: Callable[[], T]) -> T:
    """Return ``work()``. Whatever Pillow raises on a broken file becomes a UserError."""
    try:
        return work()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    match error:
        case UnidentifiedImageError():
            why = f"none of {', '.join(FORMATS)}"
        case Image.DecompressionBombError():
            why = f"more than {MOST_PIXELS} pixels"
        case MemoryError():
            why = "it needs more memory than there is"
        case OSError(strerror=str(why)):
            pass
        case _:
            why = short(error) or type(error).__name__
    return UserError(f"{path}: this image can't be read ({why}): replace it, or leave it out")


def silence() -> None:
    """Silence the decoders' warnings from here on, where images are decoded at any time: what matters raises an error anyway."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"PIL\.|torchvision\.io")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings (of sizes, of broken EXIF) and log lines: what matters raises an error anyway."""
    logger = logging.getLogger("PIL")
    former = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        logger.setLevel(former)
