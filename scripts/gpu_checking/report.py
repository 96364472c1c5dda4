"""The rows of scripts/gpu_check.py, and the Markdown report that they make."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lifequant.common.errors import one_line

OK, FAULT, SKIPPED, MEASURED = "ok", "FAULT", "skipped", "measured"
LAST_LINES = 12  # of a command's output, where its check isn't ok
LEGEND = (
    "`ok`: it works as it should. `FAULT`: it does not, see the details. `measured`: a figure, neither good nor bad. "
    "`skipped`: not checked, the text says why."
)


@dataclass
class Call:
    """A command that was run: its words, the variables set for it, exit code (None: stopped), output, seconds."""

    words: Sequence[str]
    variables: dict[str, str] = field(default_factory=dict)
    code: int | None = None
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    bad: bool = False  # it ended otherwise than it should

    def line(self, names: Mapping[str, str]) -> str:
        """As one types it, with ``names`` {path: shell variable} put in."""
        set_before = [f"{name}={value}" for name, value in self.variables.items()]
        return " ".join(quoted(word, names) for word in [*set_before, *self.words])

    def ending(self) -> str:
        if self.code is None:
            return "it was stopped"
        return f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"

    def last_lines(self) -> list[str]:
        """Of stdout, then of stderr, which says what went wrong."""
        return [line for text in (self.out, self.err) for line in text.splitlines() if line.strip()][-LAST_LINES:]


def quoted(word: str, names: Mapping[str, str]) -> str:
    """For a shell. Where a name is put in, double quotes stand for single ones, so that it is replaced."""
    new = word
    for path, name in names.items():
        new = new.replace(path, f"${name}")
    if shlex.quote(word) == word:
        return new
    return shlex.quote(word) if new == word else f'"{new}"'


@dataclass
class Row:
    """A line of the report. ``more`` is Markdown for its details."""

    name: str
    verdict: str
    text: str
    seconds: float = 0.0
    calls: Sequence[Call] = ()
    more: str = ""


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines."""
    lines = ["| check | verdict | what was found | s |", "|---|---|---|---:|"]
    for row in rows:
        lines.append(f"| {row.name} | {row.verdict} | {one_line(row.text).replace('|', '/')} | {row.seconds:.0f} |")
    return lines


def details(row: Row, names: Mapping[str, str]) -> list[str]:
    """Markdown lines: the commands, and what they said last where the row isn't ok."""
    lines = [f"### {row.name}: {row.verdict}", ""]
    if row.calls:
        lines += ["```shell", *(call.line(names) for call in row.calls), "```", ""]
    if row.verdict == FAULT:
        # Of many commands those that failed are of interest, and where all ended well the last one.
        for call in [call for call in row.calls if call.bad] or list(row.calls[-1:]):
            lines += [f"The last lines ({call.ending()}, {call.seconds:.0f} s) of", "", f"`{call.line(names)}`", ""]
            lines += ["```", *map(one_line, call.last_lines()), "```", ""]
    return [*lines, *([row.more, ""] if row.more else [])]


def markdown(heading: Sequence[str], rows: Sequence[Row], left: Sequence[str], names: Mapping[str, str]) -> str:
    """The whole report. ``left``: checks that are still to come; ``names``: {path: shell variable} for the commands."""
    lines = ["# LifeQuant on a GPU", "", *(f"- {line}" for line in heading), "", LEGEND, "", *table(rows), ""]
    if left:
        lines += [f"Still to come: {', '.join(left)}.", ""]
    if any(row.calls for row in rows):
        lines += ["## Details", "", "The commands were run in the clone's folder, with", "", "```shell"]
        lines += [*(f"{name}={shlex.quote(path)}" for path, name in names.items()), "```", ""]
    for row in rows:
        lines += details(row, names) if row.calls or row.more else []
    return "\n".join(lines).rstrip() + "\n"
