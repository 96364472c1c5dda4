"""Pictures for TensorBoard: the accuracy matrix, and the codes of all quantized tensors. They need Pillow alone.

TensorBoard scales pictures to a third and to more than their size, without smoothing: so they are large, and so is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lifequant.qat.code_usage import CodeCounts

WIDTH = 900  # pixels
LEFT, TOP, RIGHT, BOTTOM = 130, 130, 20, 76  # margins of the matrix
SMALLEST, HIGHEST = 38, 160  # sides of a cell
TITLE = 260  # height of all cells that the upright title needs
SHADES = ((247, 251, 255), (107, 174, 214), (8, 48, 107))  # ColorBrewer's Blues
INK, GRAY = (30, 30, 30), (150, 150, 150)
COLUMNS, CHART, HEADING = 5, (180, 140), 60  # charts in a row of the codes' picture, pixels of one, and of a heading
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
    height = max(min(width, HIGHEST), TITLE // tasks)
    size = (LEFT + tasks * width + RIGHT, TOP + tasks * height + BOTTOM)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    highest = max(max(row) for row in matrix) or 1.0
    digits, labels, titles = _font(min(0.34 * width, 54)), _font(min(0.5 * width, 44)), _font(44)
    thick = 0.5 if width > 60 else 0
    draw.text((LEFT + tasks * width / 2, 34), "tested on task", INK, titles, anchor="mm", stroke_width=0.5)
    _upright(image, (34, TOP + tasks * height / 2), "trained up to task", titles)
    for i, id in enumerate(ids):
        draw.text((LEFT + (i + 0.5) * width, TOP - 32), str(id), INK, labels, anchor="mm")
        draw.text((LEFT - 32, TOP + (i + 0.5) * height), str(id), INK, labels, anchor="mm")
        for column in range(tasks):
            left, top = LEFT + column * width, TOP + i * height
            box = (left, top, left + width - 2, top + height - 2)
            if i >= len(matrix):
                draw.rectangle(box, outline=(225, 225, 225))
                continue
            share = matrix[i][column] / highest
            draw.rectangle(box, shade(share))
            ink = "white" if share > 0.55 else INK
            draw.text(
                (left + width / 2 - 1, top + height / 2),
                f"{matrix[i][column]:.1f}",
                ink,
                digits,
                anchor="mm",
                stroke_width=thick,
            )
    note = f"Class-IL accuracy in %; darkest: {highest:.1f}"
    draw.text((LEFT + tasks * width / 2, size[1] - 36), note, INK, _font(36), anchor="mm")
    return np.asarray(image)


def codes_picture(codes: Mapping[str, CodeCounts]) -> np.ndarray:
    """uint8 [H, 900, 3]: for each quantized tensor a small bar chart of how often each of its codes occurs."""
    groups = {"weights": ".weight_quant", "activations": ".act_quant"}
    parts = {title: [name for name in codes if name.endswith(ending)] for title, ending in groups.items()}
    wide, high = CHART
    rows = {title: -(-len(names) // COLUMNS) for title, names in parts.items()}
    image = Image.new("RGB", (COLUMNS * wide, sum(HEADING + n * high for n in rows.values())), "white")
    draw = ImageDraw.Draw(image)
    begin = 0
    for title, names in parts.items():
        draw.text((8, begin + HEADING / 2), title, INK, _font(32), anchor="lm", stroke_width=0.5)
        begin += HEADING
        for index, name in enumerate(names):
            _chart(draw, name, codes[name], (index % COLUMNS * wide, begin + index // COLUMNS * high))
        begin += rows[title] * high
    return np.asarray(image)


def _chart(draw: ImageDraw.ImageDraw, name: str, codes: CodeCounts, corner: tuple[int, int]) -> None:
    """The name of one tensor, how many of its codes occur, and the bars."""
    left, top = corner[0] + 8, corner[1] + 4
    used, every = int((codes.counts > 0).sum()), codes.quantizer.qp - codes.quantizer.qn + 1
    draw.text((left, top), name.rpartition(".")[0][-18:], INK, _font(19))
    draw.text((left, top + 22), f"{used} of {every} codes", INK, _font(19))
    _bars(draw, codes.counts.tolist(), (left, top + 52, left + CHART[0] - 16, top + CHART[1] - 16))


def _bars(draw: ImageDraw.ImageDraw, counts: Sequence[int], box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = box
    each = -(-len(counts) // MOST_BARS)  # codes a bar
    bars = [sum(counts[i : i + each]) for i in range(0, len(counts), each)]
    width = (right - left) / len(bars)
    for i, value in enumerate(bars):
        if value:
            begin, height = left + i * width, max((bottom - top) * value / max(bars), 1)
            draw.rectangle((begin, bottom - height, begin + width - min(1.5, width / 4), bottom), SHADES[1])
    draw.line((left, bottom, right, bottom), GRAY)


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _upright(image: Image.Image, middle: tuple[float, float], text: str, font: ImageFont.FreeTypeFont) -> None:
    """Draw ``text`` from the bottom to the top around ``middle``."""
    left, top, right, bottom = font.getbbox(text)
    drawn = Image.new("RGB", (int(right - left) + 4, int(bottom - top) + 4), "white")
    ImageDraw.Draw(drawn).text((2 - left, 2 - top), text, INK, font, stroke_width=0.5)
    drawn = drawn.rotate(90, expand=True)
    image.paste(drawn, (round(middle[0] - drawn.width / 2), round(middle[1] - drawn.height / 2)))
