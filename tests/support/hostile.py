"""What every refusal must be."""

from __future__ import annotations

import pytest

from lifequant.common.errors import UserError, one_line


def refused(work, *words: str) -> None:
    """``work()`` raises UserError whose line is short and printable, and has the words."""
    with pytest.raises(UserError) as error:
        work()
    line = one_line(error.value)
    assert line.isprintable() and len(line) < 1000
    for word in words:
        assert word in line
