"""Changes of bytes, of a CSV and of a dataset.json, chosen by a generator, for fuzz.py."""

from __future__ import annotations

import csv
import io
import json
import random

ODD = [
    *("..", "../a", "/etc/passwd", "C:\\a", "\\\\host\\a", "a/../../b", "train/./a/0.png", "train//a/0.png", "train", "", " "),
    *("-1", "0.5", "1e3", "nan", "99999", "100000", "999999999", str(2**63), "9" * 5000, "٣", "²", "0x1", "true", "0" * 9),
    *("\0", "\x1b[31m", "\r", "\n", "\r\n", "\n\n", '"', '""', '"\n"', ",", ",,,", ";", "\t", "\ufeff", "\u202e", "\u2028"),
    *("e\u0301", "\u00e9", "\uff0e\uff0e\uff0f", "\U0001f600", "x" * 300, "x" * 5000, "a/" * 2000, "image,label", "image", "label"),
    *("NaN", "Infinity", "1e999", "null", "{}", "[]", "[" * 3000, '{"a":' * 3000, '"\\ud800"', '"\\u0000"', "-1", "1" * 400),
]  # fmt: skip
BYTES = [text.encode() for text in ODD] + [
    b"\xff",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xc0\xae",
    b"x" * 200_000,
    b"\x00" * 64,
]


def mutated(content: bytes, dice: random.Random) -> bytes:
    """``content`` after one to four changes."""
    for _ in range(dice.randint(1, 4)):
        start, stop = sorted(dice.choices(range(len(content) + 1), k=2))
        match dice.randrange(8):
            case 0:  # bits of a few bytes
                changed = bytearray(content)
                for place in dice.choices(range(len(content)), k=dice.randint(1, 8)) if content else []:
                    changed[place] ^= 1 << dice.randrange(8)
                content = bytes(changed)
            case 1:
                content = content[:start] + dice.choice(BYTES) + content[start:]
            case 2:
                content = content[:start]
            case 3:
                content = content[:start] + content[stop:]
            case 4:
                content = content[:stop] + content[start:stop] * dice.randint(1, 3) + content[stop:]
            case 5:  # a number at its end
                width = dice.choice((1, 2, 4))
                value = dice.choice((0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)) % 2 ** (
                    8 * width
                )
                content = (
                    content[:start] + value.to_bytes(width, dice.choice(("big", "little"))) + content[start + width :]
                )
            case 6:
                content = content[:start] + dice.randbytes(dice.randint(1, 16)) + content[start:]
            case 7:  # a value of a CSV or JSON
                places = [place for place, byte in enumerate(content) if byte in b',\n:[{"'] or [0]
                start = dice.choice(places[:200])
                end = min((place for place in places if place > start), default=len(content))
                content = content[: start + 1] + dice.choice(BYTES) + content[end:]
    return content


def mutated_csv(content: bytes, dice: random.Random) -> bytes:
    """As ``mutated``, but by whole cells and rows, so that it stays a CSV."""
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(dice.randint(1, 2)):
        row = dice.randrange(1, len(rows))
        match dice.randrange(6):
            case 0:
                rows[row][dice.randrange(2)] = dice.choice(ODD)
            case 1:
                rows[row][0] = dice.choice(("train/", "../", "out/", "loop/", "", "train/0/")) + dice.choice(ODD)
            case 2:
                rows[row][1] = str(dice.choice((0, 1, 2, 3, 7, 99_999)))
            case 3:
                rows.append(list(dice.choice(rows)))
            case 4:
                rows = [[*cells, dice.choice(ODD)] for cells in rows]
            case 5:
                rows = (
                    [cells[::-1] for cells in rows]
                    if len(rows) < 3 or dice.random() < 0.5
                    else rows[:row] + rows[row + 1 :]
                )
    out = io.StringIO()
    csv.writer(out, lineterminator=dice.choice(("\n", "\r\n")), quoting=dice.choice((0, 1))).writerows(rows)
    return dice.choice((b"", b"\xef\xbb\xbf")) + out.getvalue().encode("utf-8", "surrogatepass")


def mutated_json(content: bytes, dice: random.Random) -> bytes:
    """Another value for one or two keys, at any depth."""
    record = json.loads(content)
    for _ in range(dice.randint(1, 2)):
        inside = record
        key = dice.choice(list(inside))
        while isinstance(inside[key], dict | list) and inside[key] and dice.random() < 0.5:
            inside = inside[key]
            key = dice.choice(list(inside)) if isinstance(inside, dict) else dice.randrange(len(inside))
        odd = [
            None,
            True,
            -1,
            0,
            1,
            1.5,
            2**63,
            10**400,
            float("nan"),
            float("inf"),
            [],
            {},
            [[]],
            [None],
            [1, 1],
            ["a", "a"],
        ]
        inside[key] = dice.choice([*odd, {"a": 1}, ["\0"], ["x"] * 1000, list(map(str, range(3000))), *ODD])
    return json.dumps(record).encode()
