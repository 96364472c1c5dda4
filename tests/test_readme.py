"""What the README shows: its examples run, its lists are whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.tiny import train

from lifequant import registry
from lifequant.config import Config

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def example(file: str) -> str:
    """The code block that follows the mention of a file."""
    found = re.search(rf"`{re.escape(file)}`:\n\n```python\n(.*?)```", README, re.DOTALL)
    assert found, file
    return found.group(1)


def lines_of_code(text: str) -> int:
    """Neither blank nor the module's docstring."""
    return sum(bool(line.strip()) for line in text.splitlines()[1:])


@pytest.mark.parametrize(
    ("file", "kind", "name"),
    [("lifequant/methods/l2.py", "method", "l2"), ("lifequant/quantizers/maxabs.py", "quantizer", "maxabs")],
)
def test_example(file, kind, name, tiny, tmp_path, monkeypatch):
    """As a file of the package would: it registers itself, and two tasks train with it."""
    for every in ("method", "quantizer", "model"):
        registry.names(every)
    monkeypatch.setattr(registry, "_registered", {k: dict(v) for k, v in registry._registered.items()})
    code = example(file)
    exec(compile(code, file, "exec"), {})
    found = train(tiny, tmp_path / "run", **{"method": "replay", kind: name})
    assert found["config"][kind] == name
    if kind == "method":
        assert found["memory_bytes"]["reference"] > 4 * 268_000
        assert f"A method of {lines_of_code(code)} lines" in README
    else:
        assert all(entry["codes"] <= 2 ** entry["bits"] for entry in found["max_codes_per_tensor"].values())
        assert f"One of {lines_of_code(code)} lines" in README


def test_lists_are_whole():
    """Names as --list has them; every flag is in a table or in --help's own words."""
    assert registry.describe() in README
    table = set(re.findall(r"`--(\w+)", README))
    told = {
        "method",
        "quantizer",
        "act_quantizer",
        "layer_bits",
        "per_channel",
        "bit_schedule",
        "distill",
        "ema",
        "nme",
    }
    told |= {"head_epochs", "bn_reestimate", "track_oscillations", "freeze_oscillating", "penalty", "loss", "sampler"}
    assert told <= table and told <= set(Config.__dataclass_fields__)
