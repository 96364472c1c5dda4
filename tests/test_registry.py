"""--list, unknown names, and what other packages add by entry points."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lifequant import presets, registry
from lifequant.__main__ import train as command
from lifequant.common.errors import UserError

TOP = Path(__file__).resolve().parents[1]
OTHER = """
from lifequant.methods.base import LifelongMethod
from lifequant.models.resnet import ResNet
from lifequant.quantizers.lsq import LSQQuantizer


class Halved(LifelongMethod):
    help = "half the loss (nobody, 2026)"

    def task_loss(self, logits, batch):
        return super().task_loss(logits, batch) / 2


class Same(LSQQuantizer):
    help = "lsq by another name"


def resnet8(num_classes, scheme, shortcut="A"):
    "ResNet-8."
    return ResNet(8, num_classes, scheme, shortcut)
"""


KINDS = ["method", "penalty", "quantizer", "model"]


def test_list(capsys):
    """Every name is on a line of its own, with what it is behind it."""
    assert command(["--list"]) == 0
    out = capsys.readouterr().out.splitlines()
    lines = [
        line.split(None, 1) for line in out if line and line[0] != " " and " " in line and not line.endswith("NAME):")
    ]
    known = [name for kind in KINDS for name in registry.names(kind)] + presets.names() + list(presets.recipes())
    assert sorted(name for name, _ in lines) == sorted(known)
    assert all(len(text) > 10 for _, text in lines) and max(map(len, out)) <= 80
    assert all(f"also called {alias}" in " ".join(" ".join(out).split()) for alias in registry.ALIASES["method"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_says_what_it_is(kind):
    for name in registry.names(kind):
        thing = registry.quantizer_class(name) if kind == "quantizer" else getattr(registry, kind)(name)
        assert (getattr(thing, "help", "") or thing.__doc__).strip(), name


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_name(kind):
    wrong = registry.names(kind)[0] + "x"
    with pytest.raises(UserError, match=f"unknown {kind} '{wrong}'; did you mean '{wrong[:-1]}'"):
        getattr(registry, kind)(wrong)


def package(folder: Path, points: str) -> dict[str, str]:
    """A package as pip would have installed it; the environment that sees it."""
    (folder / "other.py").write_text(OTHER)
    info = folder / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOP), str(folder)])}


def listed(environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "lifequant", "--list"]
    return subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True)


def test_other_packages(tmp_path):
    """Its method, quantizer and model are listed, and work by name."""
    points = "[lifequant.methods]\nhalved = other:Halved\n[lifequant.quantizers]\nsame = other:Same\n"
    environment = package(tmp_path, points + "[lifequant.models]\nresnet8 = other:resnet8\n")
    done = listed(environment, tmp_path)
    names = [line.split(None, 1)[0] for line in done.stdout.splitlines() if line]
    assert done.returncode == 0 and {"halved", "same", "resnet8", "ours", "lsq"} <= set(names), done.stderr
    code = "from lifequant import options; from lifequant.models.build import build; \
        c = options.make(method='halved', quantizer='same', target_model='resnet8', csv_dir='x'); \
        print(sum(p.numel() for p in build(c, 10).parameters() if p.dim() == 4))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    convolutions = 3 * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64
    assert done.stdout.strip() == str(9 * convolutions), done.stderr


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ("[lifequant.methods]\nhalved = other:Quartered\n", ["'halved' of other", "can't be loaded"]),
        ("[lifequant.quantizers]\nlsq = other:Same\n", ["'lsq' of other", "there is a quantizer of that name already"]),
    ],
)
def test_bad_packages(points, words, tmp_path):
    done = listed(package(tmp_path, points), tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and all(word in done.stderr for word in words)
