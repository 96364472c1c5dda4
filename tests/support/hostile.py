"""What every refusal must be, and changed files, drawn by hypothesis, that must load or be refused."""

from __future__ import annotations

import csv
import io
import json
import resource
import signal
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lifequant.common.errors import UserError, one_line

few = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SECONDS, GIGABYTES = 20, 1.0  # that one changed file may take

ODD = [
    *("..", "../a", "/etc/passwd", "C:\\a", "\\\\host\\a", "a/../../b", "train//a/0.png", "train", "", " "),
    *("-1", "0.5", "1e3", "nan", "100000", "999999999", str(2**63), "9" * 5000, "\u0663", "\u00b2", "0x1", "true"),
    *("\0", "\x1b[31m", "\r", "\n", "\r\n", '"', '""', '"\n"', ",", ",,,", ";", "\t", "\ufeff", "\u202e", "\u2028"),
    *("e\u0301", "\uff0e\uff0e\uff0f", "\U0001f600", "\ud800", "x" * 300, "x" * 5000, "a/" * 2000, "image,label"),
    *("NaN", "Infinity", "1e999", "null", "{}", "[]", "[" * 3000, '{"a":' * 3000, '"\\ud800"', '"\\u0000"', "1" * 400),
]
VALUES = [None, True, -1, 0, 1, 1.5, 2**63, 10**400, float("nan"), float("inf"), [], {}, [[]], [None], ["a", "a"]]
VALUES += [{"a": 1}, ["\0"], ["x"] * 1000, [str(n) for n in range(3000)], *ODD]
BYTES = [b"\xff", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xae", b"x" * 200_000, b"\x00" * 64]
BYTES += [text.encode("utf-8", "surrogatepass") for text in ODD]


def refused(work: Callable[[], object], *words: str) -> None:
    """``work()`` raises UserError whose line is short and printable, and has the words."""
    with pytest.raises(UserError) as error:
        work()
    line = one_line(error.value)
    assert line.isprintable() and len(line) < 1000
    for word in words:
        assert word in line


def loads_or_refuses(work: Callable[[], object]) -> None:
    """``work()`` succeeds or raises a proper UserError, in SECONDS, and the process does not grow by GIGABYTES."""

    def too_long(number: int, frame: object) -> None:
        raise KeyboardInterrupt(f"longer than {SECONDS} s")  # no handler takes it for a broken file

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    former = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        work()
    except UserError as error:
        line = one_line(error)
        assert line.isprintable() and len(line) < 1000
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTES * 1e6  # Linux counts kB


@st.composite
def changed_bytes(draw, content: bytes) -> bytes:
    """``content`` after one to four changes of bits, of bytes, of a number or of a value of a CSV or JSON."""
    for _ in range(draw(st.integers(1, 4))):
        start, stop = sorted(draw(st.integers(0, len(content))) for _ in range(2))
        kind = draw(st.sampled_from(["bits", "insert", "cut", "remove", "repeat", "number", "value"]))
        odd = draw(st.sampled_from(BYTES) | st.binary(min_size=1, max_size=16))
        if kind == "bits" and start < len(content):
            content = content[:start] + bytes([content[start] ^ draw(st.integers(1, 255))]) + content[start + 1 :]
        elif kind == "insert":
            content = content[:start] + odd + content[start:]
        elif kind == "cut":
            content = content[:start]
        elif kind == "remove":
            content = content[:start] + content[stop:]
        elif kind == "repeat":
            content = content[:stop] + content[start:stop] * draw(st.integers(1, 3)) + content[stop:]
        elif kind == "number":
            width = draw(st.sampled_from([1, 2, 4]))
            number = draw(st.sampled_from([0, 1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1])) % 256**width
            content = content[:start] + number.to_bytes(width, draw(st.sampled_from(["big", "little"]))) + content[start + width :]  # fmt: skip
        elif kind == "value" and (places := [i for i, byte in enumerate(content) if byte in b',\n:[{"'][:200]):
            start = draw(st.sampled_from(places))
            stop = next((i for i in range(start + 1, len(content)) if content[i] in b',\n:[{"'), len(content))
            content = content[: start + 1] + odd + content[stop:]
    return content


@st.composite
def changed_csv(draw, content: bytes) -> bytes:
    """A CSV of which a cell, a row or the columns have changed."""
    rows = list(csv.reader(io.StringIO(content.decode())))
    row = draw(st.integers(1, len(rows) - 1))
    odd = draw(st.sampled_from(ODD))
    kind = draw(st.sampled_from(["image", "folder", "label", "cell", "again", "column", "swapped", "fewer"]))
    if kind == "image":
        rows[row][0] = odd
    elif kind == "folder":
        rows[row][0] = draw(st.sampled_from(["train/", "../", "out/", "loop/", "train/0/"])) + odd
    elif kind == "label":
        rows[row][1] = str(draw(st.sampled_from([0, 1, 2, 3, 7, 99_999])))
    elif kind == "cell":
        rows[row][1] = odd
    elif kind == "again":
        rows.append(rows[row])
    elif kind == "column":
        rows = [[*cells, odd] for cells in rows]
    elif kind == "swapped":
        rows = [cells[::-1] for cells in rows]
    else:
        del rows[row]
    out = io.StringIO()
    csv.writer(out, lineterminator=draw(st.sampled_from(["\n", "\r\n"]))).writerows(rows)
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + out.getvalue().encode("utf-8", "surrogatepass")


@st.composite
def changed_json(draw, content: bytes) -> bytes:
    """A JSON object with another value for one key, at any depth."""
    record = inside = json.loads(content)
    key = draw(st.sampled_from(sorted(record)))
    while isinstance(inside[key], dict | list) and inside[key] and draw(st.booleans()):
        inside = inside[key]
        key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
    inside[key] = draw(st.sampled_from(VALUES))
    return json.dumps(record).encode()
