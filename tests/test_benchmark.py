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
from benchmarking import contenders, growth, inference, peers, published, report  # noqa: E402


def test_one_command(tmp_path):
    """A few rows, other libraries' among them, each a process of its own; the figures are there in the promised shape."""
    out = tmp_path / "figures.json"
    rows = ["float_eager", "lsq_eager", "brevitas" if importlib.util.find_spec("brevitas") else "torch_qat"]
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
    assert contenders.choose(["float_[ec]*d", "float_*r"]) == ["float_compiled", "float_eager"]
    assert contenders.settings_of("lsq_compiled_bf16") == contenders.settings_of("lsq_compiled") | {"amp": "bf16"}
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


def test_inference(tmp_path, monkeypatch, capsys):
    """The fast file beside the float one: speeds, ratios within rounds, the files' bytes, a picture."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is missing (extra export)")
    pytest.importorskip("onnxscript", reason="onnxscript is missing (extra export)")
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra plot)")
    monkeypatch.setattr(inference, "BATCHES", (1, 2))
    out, table, picture = tmp_path / "figures.json", tmp_path / "table.md", tmp_path / "ratios.png"
    words = [
        "--inference",
        "--quick",
        "--rows",
        "fast",
        "--json",
        str(out),
        "--out",
        str(table),
        "--picture",
        str(picture),
    ]
    threads = torch.get_num_threads()
    assert run_main(benchmark.main, words) == 0, capsys.readouterr().err
    assert torch.get_num_threads() == threads
    found, text = json.loads(out.read_text(encoding="utf-8")), table.read_text(encoding="utf-8")
    counts = sorted({1, inference.cores()})
    assert [(case["threads"], case["batch"]) for case in found["cases"]] == [(t, b) for t in counts for b in (1, 2)]
    for case in found["cases"]:
        fast, base = case["rounds"]["fast"], case["rounds"]["float_onnx"]
        assert len(fast) == len(base) == 2 and min(*fast, *base) > 0
        ratios = sorted(a / b for a, b in zip(fast, base, strict=True))
        assert case["ratios"]["fast"] == pytest.approx([sum(ratios) / 2, *ratios])
        assert case["ratios"]["float_onnx"] == [1, 1, 1]
        assert (
            "| {:.0f} | {:.2f} ({:.2f} .. {:.2f}) |".format(case["images_per_second"]["fast"], *case["ratios"]["fast"])
            in text
        )
    files = found["files"]
    assert files["fast"]["integer_convolutions"] == files["float_onnx"]["float_convolutions"] == 19
    assert files["fast"]["float_convolutions"] == files["float_onnx"]["integer_convolutions"] == 0
    assert (
        2 * files["fast"]["bytes"] < files["float_onnx"]["bytes"]
        and f"| fast | {files['fast']['bytes']} | 19 | 0 |" in text
    )
    assert found["machine"]["versions"]["onnxruntime"] == onnxruntime.__version__ and picture.stat().st_size > 0


def test_a_turn_has_its_threads():
    """torch computes a turn with the threads of its case, and with the former ones afterwards; a pass is a batch of images."""
    seen, before = [], torch.get_num_threads()
    for threads in (1, 2):
        speed = inference.speed(lambda: seen.append(torch.get_num_threads()), (threads, 4), 0.0)
        assert speed > 0 and seen == [threads] * 2  # one pass is not timed
        seen.clear()
    assert torch.get_num_threads() == before
    found = inference.measure(
        {"a": {(1, 4): lambda: seen.append("a")}, "b": {(1, 4): lambda: seen.append("b")}}, [(1, 4)], 2, 0.0
    )
    assert "".join(seen) == "aabbbbaa" and {len(values) for values in found[1, 4].values()} == {2}


def test_inference_says_what_is_missing(monkeypatch, capsys):
    """One line for a package, a flag of training, a row that isn't there."""
    for words, said in (
        (["--growth"], "--inference: --growth is of training"),
        (["--device", "cuda"], "on the CPU"),
        (["--rows", "fsat"], "did you mean 'fast'?"),
    ):
        assert run_main(benchmark.main, ["--inference", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    pytest.importorskip("onnx", reason="onnx is missing (extra export)")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run_main(benchmark.main, ["--inference", "--quick"]) == 2
    assert capsys.readouterr().err.endswith(
        'needs onnxruntime, which is not installed: pip install "lifequant[export]"\n'
    )
