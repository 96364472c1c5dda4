"""The codecs of the replay store: how many bytes a stored image takes, and the pixels that come back.

- ``webp``: lossy WebP, color at half the resolution (4:2:0, WebP has no other)
- ``jpeg``: color at half the resolution (4:2:0), the standard's Huffman tables
- ``bits4``: the nearest of 16 levels of each channel, two to a byte

What is the same in each file is not stored: WebP's container, JPEG's tables and headers. They follow from the codec,
the size of the image and the quality.

A coded image is a function of its pixels, the quality and the encoder's version, so it may be coded anew as often as it is needed.
"""

from __future__ import annotations

import io
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from lifequant.common.errors import UserError
from lifequant.data.image_storage import send, take

FORMATS = {
    "webp": ("WEBP", "webp", {"method": 4}),
    "jpeg": ("JPEG", "libjpeg_turbo", {"subsampling": "4:2:0"}),
}  # codec: (Pillow's name, the encoder's name there, what it is told)
LEVEL = 17  # between two of 16 levels: 0, 17, ..., 255
AT_A_TIME = 1024  # images whose raw and coded pixels are held beside the result


def versions(codec: str) -> dict[str, str]:
    """{encoder: version}, of which a coded image's pixels are a function. Raises UserError where Pillow lacks the encoder."""
    if codec not in FORMATS:
        return {}
    name, encoder, _ = FORMATS[codec]
    if not features.check({"jpeg": "jpg"}.get(codec, codec)):
        raise UserError(
            f"--replay_codec {codec}: this Pillow can't write {name}: install another, or choose another codec"
        )
    return {encoder: str(features.version(encoder)), "pillow": Image.__version__}


def encode(pixels: np.ndarray, codec: str, quality: int | None) -> bytes:
    """The bytes that stand for one image, uint8 [3, H, W]."""
    if codec == "bits4":
        levels = ((pixels.astype(np.uint16) + LEVEL // 2) // LEVEL).astype(np.uint8).reshape(-1)
        levels = np.append(levels, np.zeros(len(levels) % 2, np.uint8))
        return (levels[::2] << 4 | levels[1::2]).tobytes()
    file = _file(pixels, codec, quality)
    if codec == "webp":
        (size,) = struct.unpack("<I", file[16:20])
        return file[20 : 20 + size]  # a byte of padding may follow
    return file.removeprefix(_jpeg_header(pixels.shape, quality))


def decode(data: bytes, codec: str, quality: int | None, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 ``shape`` = [3, H, W], of what ``encode`` gave."""
    if codec == "bits4":
        packed = np.frombuffer(data, np.uint8)
        levels = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: np.prod(shape)]
        return (levels * LEVEL).reshape(shape)
    if codec == "webp":
        padded = data + b"\0" * (len(data) % 2)
        file = b"RIFF" + struct.pack("<I", len(padded) + 12) + b"WEBPVP8 " + struct.pack("<I", len(data)) + padded
    else:
        file = _jpeg_header(shape, quality) + data
    return np.array(Image.open(io.BytesIO(file))).transpose(2, 0, 1)


def _file(pixels: np.ndarray, codec: str, quality: int | None) -> bytes:
    """A whole file, as Pillow writes it."""
    name, _, more = FORMATS[codec]
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(data, name, quality=quality, **more)
    return data.getvalue()


@cache
def _jpeg_header(shape: tuple[int, int, int], quality: int | None) -> bytes:
    """What all JPEG files of this shape and quality begin with: all up to the coded pixels, which the marker FF DA begins."""
    file = _file(np.zeros(shape, np.uint8), "jpeg", quality)
    scan = file.index(b"\xff\xda")
    (size,) = struct.unpack(">H", file[scan + 2 : scan + 4])
    return file[: scan + 2 + size]


def label_bytes(num_classes: int) -> int:
    """Bytes of a stored label."""
    return -(-max(num_classes - 1, 1).bit_length() // 8)


class CodedImages:
    """The pixels of some rows as their codec gives them back. They are coded by ``code``, or when first asked for, then kept."""

    def __init__(self, images: Tensor, rows: Tensor, codec: str, quality: int | None) -> None:
        """``images``: the store, uint8 [N, 3, H, W]; ``rows``: int64 [M], ascending, on the device that trains."""
        self.images, self.rows, self.codec, self.quality = images, rows, codec, quality
        self.pixels: Tensor | None = None  # uint8 [M, 3, H, W] on the device of ``rows``
        self.sizes: Tensor | None = None  # int64 [M], bytes

    def code(self) -> None:
        """Code all rows; takes 3 H W bytes a row."""
        if self.pixels is not None:
            return
        shape = tuple(self.images.shape[1:])
        pixels = torch.empty(len(self.rows), *shape, dtype=torch.uint8)
        sizes = torch.empty(len(self.rows), dtype=torch.int64)

        def one(raw: np.ndarray) -> tuple[int, np.ndarray]:
            data = encode(raw, self.codec, self.quality)
            return len(data), decode(data, self.codec, self.quality, shape)

        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self.rows), AT_A_TIME):
                part = take(self.images, self.rows[start : start + AT_A_TIME], torch.device("cpu")).numpy()
                for place, (size, values) in enumerate(pool.map(one, part), start):
                    sizes[place], pixels[place] = size, torch.from_numpy(values)
        self.pixels, self.sizes = send(pixels, self.rows.device), sizes

    def over(self, batch: Tensor, rows: Tensor) -> Tensor:
        """``batch`` [N, 3, H, W] of these ``rows`` [N], with the coded pixels of those that are coded. A GPU is not waited for."""
        self.code()
        if not len(self.rows):
            return batch
        place = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
        coded = (self.rows[place] == rows)[:, None, None, None]
        return torch.where(coded, self.pixels[place], batch)

    def sizes_of(self, rows: Tensor) -> list[int]:
        """Bytes of each of these rows, which are coded ones."""
        self.code()
        return self.sizes[torch.searchsorted(self.rows, rows).cpu()].tolist()
