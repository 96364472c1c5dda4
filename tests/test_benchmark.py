"""scripts/benchmark.py: its command line, what it computes from rounds, the published scheme's quantizer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lifequant.common.arguments import run_main

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402
from benchmarking import contenders, growth, peers, published, report  # noqa: E402


def test_one_command(tmp_path):
    """A few rows, other libraries' among them, each a process of its own; the figures are there in the promised shape."""
    out = tmp_path / "figures.json"
    rows = ["float_eager", "lsq_eager", "torch_qat", *(["brevitas"] if importlib.util.find_spec("brevitas") else [])]
    words = ["--rows", ",".join(rows), "--steps", "1", "--rounds", "1", "--batch", "8", "--device", "cpu"]
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), *words, "--json", str(out)]
    path = os.pathsep.join([str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["images_per_second"]) == set(rows)
    for row, median in found["images_per_second"].items():
        assert found["spread"][row] == [median, median] and median > 0
        assert f"| {row} | {median:.1f} |" in done.stdout
    speeds = found["images_per_second"]
    assert found["ratios"]["lsq_eager / float_eager"][0] == pytest.approx(speeds["lsq_eager"] / speeds["float_eager"])
    assert found["machine"]["versions"]["torch"] == torch.__version__ and found["not_there"] == {}


def test_unknown_row(capsys):
    assert run_main(benchmark.main, ["--rows", "flaot_eager"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'float_eager'?" in error and error.count("\n") == 1


def test_rows():
    rows = contenders.known_rows()
    assert {"lsq_compiled", "ours_compiled", "ewc_compiled", "ewc_eager", "brevitas", "published_scheme"} <= set(rows)
    assert not {"original_compiled", "ewc_eager"} & set(contenders.default_rows())
    assert contenders.choose(["float_*", "float_eager"]) == ["float_eager", "float_compiled"]
    assert contenders.settings_of("lsq_compiled") == {"method": "original", "quantizer": "lsq", "bitW": 4}
    assert contenders.settings_of("er_ace_eager") == {"method": "er_ace", "bitW": 4}
    assert contenders.settings_of("torch_qat") == contenders.settings_of("float_eager")


def test_ratios_are_taken_within_rounds():
    """The median of ratios, which is not the ratio of medians here."""
    speeds = {"float_compiled": [1.0, 4.0, 2.0], "ours_compiled": [1.0, 2.0, 4.0]}
    args = type("Args", (), {"model": "m", "batch": 8, "rounds": 3, "steps": 1, "device": "cpu"})
    machine = report.machine(args)
    found = report.summary(
        speeds, {"brevitas": "not installed: pip install brevitas"}, dict.fromkeys(speeds, 1.0), machine, args
    )
    assert found["ratios"]["ours_compiled / float_compiled"] == [1.0, 0.5, 2.0]
    assert found["ratios"]["float_compiled / ours_compiled"] == [1.0, 0.5, 2.0]
    assert "| brevitas | - | not installed: pip install brevitas |" in report.markdown(found)


def test_published_rounding():
    """Values by numpy, the gradient straight through the rounding and true through mean and deviation."""
    w = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    a = w.detach().numpy()
    out = published.WeightRounding(4)(w)
    np.testing.assert_allclose(out.detach(), np.rint((a - a.mean()) / a.std(ddof=1) / 2 * 15) / 15, atol=1e-12)
    weights = torch.arange(40, dtype=torch.float64)
    (got,) = torch.autograd.grad((out * weights).sum(), w)
    smooth = (((w - w.mean()) / w.std() / 2) * weights).sum()
    torch.testing.assert_close(got, torch.autograd.grad(smooth, w)[0])


def test_slope():
    """numpy's fit of the logarithms; what is quadratic is flagged, what may be noise is not."""
    sizes, costs = [1.0, 2.0, 8.0, 20.0], [3.0, 5.0, 40.0, 70.0]
    assert growth.slope(sizes, costs) == pytest.approx(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
    assert growth.slope(sizes, [7.0] * 4) == pytest.approx(0)
    point = {"memory": [1.0], "importance": [1.0], "evaluation": [1.0]}
    rising = [point | {"step": [n**2, 1.1 * n**2]} for n in sizes]
    noisy = [point | {"step": [n, 1.15 * n**1.2, 30.0]} for n in sizes]
    assert growth.table("batch", [1, 2, 8, 20], rising)[1]["step"]["worse_than_linear"]
    assert not growth.table("batch", [1, 2, 8, 20], noisy)[1]["step"]["worse_than_linear"]


def test_missing_package(monkeypatch):
    """A row whose package isn't there says what installs it; nothing else needs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.missing("brevitas_compiled") == "brevitas is not installed: pip install brevitas"
    assert peers.missing("float_eager") is None
