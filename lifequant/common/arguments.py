"""What every command line shares: a parser that raises UserError, argument types, and the exit code.

``python script.py`` is ``sys.exit(run_main(main, sys.argv[1:]))``: a user's mistake prints one line on stderr and
exits 2, without a traceback.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lifequant.common.errors import UserError, closest_flag, one_line

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, raises UserError instead of exiting, names the flag that is meant by an unknown one.

    A text that begins with ``~`` names the user's home folder, for a shell leaves the ``~`` of ``--out=~/runs`` as it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(*args, **kwargs)
        self.register("type", None, os.path.expanduser)  # of the flags that have no type of their own

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse as argparse does, but report a mistyped flag before a required flag that is missing because of it."""
        words = list(sys.argv[1:] if args is None else args)
        flags = words[: words.index("--")] if "--" in words else words
        self._refuse([word for word in flags if word.startswith("--") and not self._knows(word)], words)
        parsed, rest = self.parse_known_args(words, namespace)
        self._refuse([word for word in rest if word != "--"], words)
        return parsed

    def _knows(self, word: str) -> bool:
        return word.split("=", 1)[0] in self._option_string_actions

    def _refuse(self, words: Sequence[str], given: Sequence[str]) -> None:
        if words and words[0].startswith("-"):
            flag = words[0].split("=", 1)[0]
            raise UserError(f"unknown flag {flag}{closest_flag(flag, self._option_string_actions)} (--help lists all)")
        if words:
            raise UserError(f"unexpected argument {words[0]!r}{_after(words[0], given)} (--help lists the flags)")


def _after(word: str, given: Sequence[str]) -> str:
    """ " after --flag value", where ``word`` follows a flag that has its value already."""
    for i in range(2, len(given)):
        if given[i] == word and given[i - 2].startswith("--") and not given[i - 1].startswith("-"):
            return f" after {given[i - 2]} {given[i - 1]}"
    return ""


def run_main(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """The exit code of ``main(argv)``: 2 after a UserError or an error of the file system, 130 after Ctrl-C."""
    try:
        return _run(main, sys.argv[1:] if argv is None else argv)
    except BaseException:  # a bug, or an exit
        _wait_for_rank_0()
        raise


def _wait_for_rank_0() -> None:
    """Under torchrun all processes fail alike. The others wait, so that only rank 0 prints the error."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)


def _run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    try:
        try:
            return main(argv) or 0
        finally:
            sys.stdout.flush()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("lifequant: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone; the interpreter's last flush must not raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # full disk, no permission, a folder where a file should be
        if error.errno is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror}{where}"
    _wait_for_rank_0()
    print(f"lifequant: error: {one_line(message)}", file=sys.stderr)
    return 2


def boolean(text: str) -> bool:
    """``True``, ``yes``, ``on``, ``1`` and their opposites, in any case."""
    word = text.strip().lower()
    if word not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return word in TRUE


def share(text: str) -> float:
    """A share in (0, 1]: a value above 1 is percent, so ``25`` and ``0.25`` are a quarter; ``1`` is all."""
    value = _float(text)
    if not 0 < value <= 100:  # NaN fails too
        raise argparse.ArgumentTypeError(
            f"{text!r} is no share: give 0.25 or 25 for a quarter, at most 1 or 100 for all"
        )
    return value / 100 if value > 1 else value


def rate(text: str) -> float:
    """A share, or 0 for none."""
    return 0.0 if text.strip() in ("0", "0.0") else share(text)


def size(text: str) -> int:
    """Bytes: ``1MB`` is a million, ``1MiB`` 2^20; without a unit, bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMG])(i?))?B?", text.strip())
    value = round(float(found[1]) * (1024 if found[3] else 1000) ** " kMG".index(found[2] or " ")) if found else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes like 500kB, 1MB or 1000000")
    return value


def quality(text: str) -> int:
    """A whole number from 1 to 100."""
    value = int_at_least(1)(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100")
    return value


def part_of_batch(text: str) -> float:
    """A share below 1, or 0 for none."""
    if (value := rate(text)) == 1:
        raise argparse.ArgumentTypeError(f"{text!r} leaves no room for new images: give a share below 1")
    return value


def int_at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number that is at least ``least``."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return convert


def real(least: float = -math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """The type of a finite number that is at least ``least`` and above ``above``."""

    def convert(text: str) -> float:
        value = _float(text)
        if not (math.isfinite(value) and value >= least and value > above):
            bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number{bound}")
        return value

    return convert


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def epochs_list(text: str) -> list[int]:
    """``10,20`` -> [10, 20]."""
    return [int_at_least(1)(part) for part in text.split(",") if part]


def below_one(text: str) -> float:
    """A number in [0, 1)."""
    value = real(0)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 1")
    return value
