"""Pictures for TensorBoard: the accuracy matrix, and the codes of all quantized tensors. They need Pillow alone.

TensorBoard scales pictures, so these are large enough to stay sharp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lifequant.qat.code_usage import CodeCounts

WIDTH = 900  # pixels
LEFT, TOP, RIGHT, BOTTOM = 110, 110, 24, 56  # margins of the matrix
SMALLEST, HIGHEST = 38, 150  # sides of a cell
SHADES = ((247, 251, 255), (107, 174, 214), (8, 48, 107))  # ColorBrewer's Blues
INK, GRAY = (30, 30, 30), (150, 150, 150)
COLUMNS, CHART = 5, (180, 112)  # charts in a row of the codes' picture, and the size of one
MOST_BARS = 64


def shade(share: float) -> tuple[int, int, int]:
    """The color of a value in [0, 1]: white to dark blue."""
    place = min(max(share, 0.0), 1.0) * (len(SHADES) - 1)
    low = min(int(place), len(SHADES) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(SHADES[low], SHADES[low + 1], strict=True))


def matrix_picture(matrix: Sequence[Sequence[float]], ids: Sequence[int]) -> np.ndarray:
    """uint8 [H, W, 3], 900 pixels wide or more: accuracies in percent, a row a trained task, a column a test set.

    ``matrix`` has a row for each task that is trained already; the others' cells stay empty. One row alone, where there are
    several tasks, is that of the first task, or of a joint training. The highest value has the darkest color.
    """
    tasks = len(ids)
    width = max((WIDTH - LEFT - RIGHT) // tasks, SMALLEST)
    height = min(width, HIGHEST)
    size = (LEFT + tasks * width + RIGHT, TOP + tasks * height + BOTTOM)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    highest = max(max(row) for row in matrix) or 1.0
    digits, labels, titles = _font(min(0.33 * width, 34)), _font(min(0.4 * width, 22)), _font(24)
    draw.text((LEFT + tasks * width / 2, 30), "tested on task", INK, titles, anchor="mm")
    _upright(image, (36, TOP + tasks * height / 2), "trained up to task", titles)
    for i, id in enumerate(ids):
        draw.text((LEFT + (i + 0.5) * width, TOP - 24), str(id), INK, labels, anchor="mm")
        draw.text((LEFT - 24, TOP + (i + 0.5) * height), str(id), INK, labels, anchor="mm")
        for column in range(tasks):
            left, top = LEFT + column * width, TOP + i * height
            box = (left, top, left + width - 2, top + height - 2)
            if i >= len(matrix):
                draw.rectangle(box, outline=(225, 225, 225))
                continue
            share = matrix[i][column] / highest
            draw.rectangle(box, shade(share))
            ink = "white" if share > 0.55 else INK
            draw.text((left + width / 2 - 1, top + height / 2), f"{matrix[i][column]:.1f}", ink, digits, anchor="mm")
    note = f"test accuracy in % (Class-IL); the darkest blue is {highest:.1f}"
    draw.text((LEFT + tasks * width / 2, size[1] - 26), note, GRAY, _font(18), anchor="mm")
    return np.asarray(image)


def codes_picture(codes: Mapping[str, CodeCounts]) -> np.ndarray:
    """uint8 [H, 900, 3]: for each quantized tensor a small bar chart of how often each of its codes occurs."""
    wide, high = CHART
    rows = -(-len(codes) // COLUMNS)
    image = Image.new("RGB", (COLUMNS * wide, rows * high), "white")
    draw = ImageDraw.Draw(image)
    for index, (name, (quant, _, counts)) in enumerate(codes.items()):
        left, top = index % COLUMNS * wide + 8, index // COLUMNS * high + 6
        used, all_codes = int((counts > 0).sum()), quant.qp - quant.qn + 1
        draw.text((left, top), _title(name), INK, _font(12))
        color = INK if used >= all_codes / 2 else (178, 34, 34)
        draw.text((left, top + 15), f"{used} of {all_codes} codes", color, _font(12))
        _bars(draw, counts.tolist(), (left, top + 34, left + wide - 16, top + high - 14))
    return np.asarray(image)


def _bars(draw: ImageDraw.ImageDraw, counts: Sequence[int], box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = box
    each = -(-len(counts) // MOST_BARS)  # codes a bar
    bars = [sum(counts[i : i + each]) for i in range(0, len(counts), each)]
    width = (right - left) / len(bars)
    for i, value in enumerate(bars):
        if value:
            height = max((bottom - top) * value / max(bars), 1)
            draw.rectangle(
                (left + i * width, bottom - height, left + (i + 1) * width - min(1.5, width / 4), bottom), SHADES[1]
            )
    draw.line((left, bottom, right, bottom), GRAY)


def _title(name: str) -> str:
    """``layer1.0.conv1.weight_quant`` -> ``layer1.0.conv1 weights``."""
    return name.replace(".weight_quant", " weights").replace(".act_quant", " activations")


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _upright(image: Image.Image, middle: tuple[float, float], text: str, font: ImageFont.FreeTypeFont) -> None:
    """Draw ``text`` from the bottom to the top around ``middle``."""
    left, top, right, bottom = font.getbbox(text)
    drawn = Image.new("RGB", (int(right - left) + 4, int(bottom - top) + 4), "white")
    ImageDraw.Draw(drawn).text((2 - left, 2 - top), text, INK, font)
    drawn = drawn.rotate(90, expand=True)
    image.paste(drawn, (round(middle[0] - drawn.width / 2), round(middle[1] - drawn.height / 2)))
