"""Text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Collection

WIDTH = 80


def wrapped(text: str, indent: int = 2, break_words: bool = True) -> str:
    """``text`` as it is if it fits, else in lines of at most WIDTH columns, all but the first one indented.

    ``break_words=False`` leaves a word that is longer than a line whole, so that a path can be copied.
    """
    if len(text) <= WIDTH:
        return text
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent * " ", break_long_words=break_words, break_on_hyphens=False
    )


def some(names: Collection[str]) -> str:
    """The first three names in quotes, and how many more there are: "'a', 'b', 'c' and 2 more"."""
    first, more = sorted(names)[:3], len(names) - 3
    return ", ".join(f"'{name}'" for name in first) + (f" and {more} more" if more > 0 else "")


def say(text: str) -> None:
    """Print a line, wrapped at blanks."""
    print(wrapped(text, break_words=False))


def duration(seconds: float) -> str:
    """For a reader: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
