"""Presets and recipes: settings kept as data, beside this file.

A recipe, NAME.toml, is a grid of runs as experiments/grid.py describes it: a paper's or another library's experiment, with its
source. ``lifequant sweep NAME`` runs it. A preset is a JSON file:

``help``: a line for --list. ``settings``: flags, the method's name among them. ``by_bits``, where a preset has it: flags that
depend on the weights' bit-width, taken from the width that is nearest. ``found``: the search that they come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def recipes() -> dict[str, Path]:
    """{name: its file}"""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def load(name: str) -> dict[str, Any]:
    """The file's content."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def settings(name: str, bits: int) -> dict[str, Any]:
    """Its flags for weights of ``bits`` bits."""
    preset = load(name)
    by_bits = preset.get("by_bits", {})
    nearest = min(by_bits, key=lambda width: abs(int(width) - bits), default=None)
    return preset["settings"] | by_bits.get(nearest, {})
