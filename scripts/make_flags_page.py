"""Write docs/flags.md (every flag of ``lifequant train``, a table for each group, and all registered names) and
lifequant/help/VERB.txt (what ``lifequant VERB --help`` prints at once, without the seconds that torch's import takes).

python scripts/make_flags_page.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

from lifequant import registry
from lifequant.__main__ import HELP, VERBS
from lifequant.options import build_parser

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
HEAD = """# Flags

`lifequant train` takes these flags, and so do `lifequant` without a verb and `resnet-20-cifar-10/main.py`. The other
verbs explain theirs by `--help`, for example `lifequant tasks --help`.

This page is made by `python scripts/make_flags_page.py`. Change a flag's text in `lifequant/config.py`, or beside the
method, penalty or quantizer that owns the flag, and run the script again.
"""
OWN = """
## Flags of methods, penalties and quantizers

A run has the flags of the method, the penalty and the quantizers that it uses. Another's flag is refused.
"""


def group_table(group: argparse._ArgumentGroup) -> str:
    """A Markdown table of a group's flags: its names, its values, its help."""
    rows = ["| flag | values | what it does |", "|---|---|---|"]
    for action in group._group_actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        values = ", ".join(f"`{choice}`" for choice in action.choices) if action.choices else action.metavar or ""
        if action.nargs == "*":
            values = ""
        text = (action.help or "") % {"default": action.default} if "%(" in (action.help or "") else action.help or ""
        if action.default not in (argparse.SUPPRESS, None, False) and "default" not in text:
            text += f" (default: {action.default})"
        rows.append(f"| {names} | {values} | {text.replace('|', '/').replace('<', '&lt;')} |".replace("|  |", "| |"))
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    parser, _ = build_parser()
    parts = [HEAD]
    own = {f"{kind} {name}" for kind in ("method", "penalty", "quantizer") for name in registry.names(kind)}
    for group in parser._action_groups[2:]:  # argparse's own two come first
        if group._group_actions and group.title not in own:
            parts.append(f"\n## {group.title[0].upper()}{group.title[1:]}\n\n{group_table(group)}\n")
    parts.append(OWN)
    things = {"method": registry.method, "penalty": registry.penalty, "quantizer": registry.quantizer_class}
    for kind, find in things.items():
        for name in registry.names(kind):
            group = argparse.ArgumentParser(add_help=False).add_argument_group(name)
            find(name).add_args(group)
            if group._group_actions:
                parts.append(f"\n### {kind.capitalize()} {name}\n\n{group_table(group)}\n")
    parts.append(f"\n## Names\n\n`lifequant list` prints these names.\n\n```\n{registry.describe()}\n```\n")
    return "".join(parts)


def help_text(verb: str) -> str:
    """What the verb's own parser prints for --help, in 80 columns."""
    module, function = VERBS[verb][0].split(":")
    call = getattr(import_module(module), function)
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="80"),
        mock.patch.object(sys, "argv", [f"lifequant {verb}"]),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        call(["--help"])
    return printed.getvalue()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    HELP.mkdir(exist_ok=True)
    for verb in VERBS:
        (HELP / f"{verb}.txt").write_text(help_text(verb), encoding="utf-8")
