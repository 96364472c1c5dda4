"""scripts/report.py: what is averaged, what is refused, what is in bold; against scipy and the statistics module."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import statistics
from importlib.util import find_spec
from pathlib import Path

import pytest

from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.experiments import columns, report, rows


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)


def results(seed=0, accuracy=50.0, shift=0.1, codes=16, **config) -> dict:
    """What a run of two tasks writes. Forgetting is 80 - accuracy."""
    R = [[80.0, 0.0], [accuracy, accuracy]]
    every = dict(seed=seed, method="ours", quantizer="proxq", bitW=4, abitW=4, num_epochs=1, train_batch_size=64)
    layer = {"fc.weight_quant": {"codes": codes, "bits": 4}}
    return {
        "schema": 1,
        "config": {**every, "image_size": 16, "dataset": "digits", "start_task": 0, "lr": 0.1, "print_freq": 50, **config},
        "tasks": [
            {"id": i, "classes": [i], "train_images": 20, "replay_images": 4 * i, "test_images": 10} for i in range(2)
        ],
        "top1": R, "top5": R, "top1_masked": [[90.0, 90.0]] * 2,
        "average_accuracy": accuracy, "forgetting": 80.0 - accuracy, "bwt": accuracy - 80.0,
        "space_shift": {"fc": [[0.0, shift], [shift, 0.0]]},
        "quantization_error": [[1.0, 2.0], [3.0, 2.0]],
        "max_codes_per_tensor": layer,
        "code_histograms": {"fc.weight_quant": {"first_code": -8, "counts": [1] * 16}},
        "memory_bytes": {"packed_model": 1000, "replay": 2000, "importance": 0, "reference": 0, "logits": 500},
        "images_per_second": 100.0 + seed,
        "versions": {"torch": "2", "lifequant": "0", "commit": "abc"},
    }  # fmt: skip


def write(folder: Path, row: str, found: dict) -> Path:
    path = folder / row / f"seed{found['config']['seed']}" / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return path


def table(folder: Path) -> dict[str, dict[str, str]]:
    return {line["row"]: line for line in csv.DictReader(io.StringIO((folder / "table.csv").read_text()))}


def refused(capsys, *argv: str) -> str:
    assert run_main(report.main, list(argv)) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    return said


def test_against_closed_forms():
    """Student's p at 1 and 2 degrees of freedom, Spearman's rho of ranks without ties; the interval holds rho."""
    for pair in ([1.0, 4.0], [0.3, -0.1]):
        t = statistics.fmean(pair) / (statistics.stdev(pair) / math.sqrt(2))
        assert rows.paired_t_test(pair) == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)), rel=1e-9)
    three = [1.0, 2.5, 0.5]
    t = statistics.fmean(three) / (statistics.stdev(three) / math.sqrt(3))
    assert rows.paired_t_test(three) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    x, y = [3.0, 1.0, 2.0, 5.0, 4.0, 9.0], [2.0, 2.5, 1.0, 7.0, 3.0, 6.0]  # ranks 3 1 2 5 4 6 and 2 3 1 6 4 5
    rho, low, high = rows.spearman(x, y)
    assert rho == pytest.approx(1 - 6 * (1 + 4 + 1 + 1 + 0 + 1) / (6 * 35)) and -1 < low < rho < high < 1
    assert rows.spearman(x[:3], y[:3]) is None and rows.spearman(x, [1.0] * 6) is None
    constant = [rows.paired_t_test(values) for values in ([2.0], [0.0, 0.0], [1.0, 1.0])]
    assert constant == [1, 1, 0]


@pytest.mark.parametrize(("share", "expected"), [(None, 3 * 2.1), (0.0, 3 * 2.1), (0.5, 3 * 3.0), (0.75, 3 * 5.0)])
def test_thousands_of_images(share, expected):
    """An epoch has each new image once; with a share of 0.5 as many stored ones, with 0.75 three times as many."""
    run = results(num_epochs=3, train_batch_size=100)
    run["config"] |= {} if share is None else {"replay_batch": share}
    for task, stored in zip(run["tasks"], (0, 100), strict=True):
        task.update(train_images=1000, replay_images=stored)
    assert columns.thousand_images(run) == pytest.approx(expected)


def test_coded_images_have_bytes_of_their_own():
    """Seeds store other images, whose codes are of other sizes; raw ones of other sizes are another setting."""
    for codec in ("webp", "raw"):
        runs = [rows.Run("row", f"{seed}", results(seed, replay_codec=codec)) for seed in range(2)]
        runs[1].results["memory_bytes"]["replay"] += 7
        with contextlib.nullcontext() if codec == "webp" else pytest.raises(UserError, match="bytes of replay differs"):
            assert len(rows.group(runs)) == 1


def test_means_and_bold(tmp_path, capsys):
    """Mean and deviation; bold at 4 bits, where the difference exceeds noise, and not at 2 bits, where it does not."""
    clear, noisy = {"a": [60, 61, 62], "b": [50, 52, 51]}, {"c": [60, 40, 50], "d": [49, 50, 48]}
    for bits, found in ((4, clear), (2, noisy)):
        for row, values in found.items():
            for seed, accuracy in enumerate(values):
                run = results(seed, accuracy, shift=1 / accuracy, bitW=bits, abitW=bits, lr=bits)
                if (row, seed) == ("a", 0):
                    run["quantization_error"] = [[4.0, 2.0], [1.0, 2.0]]  # the others': from 1 to 3
                write(tmp_path, f"deep/{row}", run)
    assert run_main(report.main, [str(tmp_path), "--latex"]) == 0
    assert "n = 12 runs" in capsys.readouterr().out
    got, text, latex = (tmp_path / name for name in ("table.csv", "report.md", "table.tex"))
    text, latex, got = text.read_text(), latex.read_text(), table(tmp_path)
    for row, values in {**clear, **noisy}.items():
        line = got[f"deep/{row}"]
        assert float(line["average_accuracy_mean"]) == pytest.approx(statistics.fmean(values), rel=1e-5)
        assert float(line["average_accuracy_std"]) == pytest.approx(statistics.stdev(values), rel=1e-5)
        assert line["n"] == "3" and line["seeds"] == "0 1 2" and float(line["other_kB_mean"]) == 0.5
    assert [got[f"deep/{row}"]["average_accuracy_best"] for row in "abcd"] == ["1", "0", "0", "0"]
    assert "| `deep/a` | 3 | **61.00 ± 1.00** | 90.00 ± 0.00 | **19.00 ± 1.00** |" in text
    p = rows.paired_t_test([b - a for a, b in zip(clear["a"], clear["b"], strict=True)])
    assert "Differences from `deep/a`, seed by seed" in text and f"| `deep/b` | 3 | -10.00 | {p:.3f} | " in text
    assert "- all rows: below 1 in 1 of 12 cases, from 0.25 to 3.00" in text
    assert "- `deep/a`: below 1 in 1 of 3 cases, from 0.25 to 3.00" in text
    assert "| `deep/c` | 3 | 50.00 ± 10.00 |" in text and "paired t-test" in text
    assert r"\texttt{deep/a} & 3 & \textbf{61.00 $\pm$ 1.00}" in latex
    assert text.index("## 4 bits") < text.index("`deep/a`") < text.index("`deep/b`") < text.index("## 2 bits")


def test_what_is_marked_and_chosen(tmp_path):
    """One seed: nothing in bold. More codes than 2^b: marked. Joint training never wins. --rows takes those alone."""
    write(tmp_path, "many", results(accuracy=70, codes=17, quantizer="apot"))
    write(tmp_path, "few|er", results(accuracy=20, lr=0.2))
    joint = results(accuracy=75, method="joint") | {"forgetting": None, "bwt": None, "space_shift": {"fc": [[0.0]]}}
    write(
        tmp_path, "joint", joint | {"top1": [[75, 75]], "top1_masked": [[75, 75]], "quantization_error": [[1.0, 1.0]]}
    )
    assert run_main(report.main, [str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "**" not in text and "one seed a row: nothing is in bold" in text and "never in bold" in text
    assert "| `many` † | 1 |" in text and "many: not b-bit, apot gives up to 17 codes" in text
    assert "`few\\|er` | 1 |" in text and "| `joint` | 1 | 75.00 | 75.00 | - | - | - |" in text
    assert run_main(report.main, [str(tmp_path), "--rows", "j*", "--out", str(tmp_path / "out")]) == 0
    assert list(table(tmp_path / "out")) == ["joint"]


def test_refusals(tmp_path, capsys):
    """What differs in anything but the seed is not averaged; what may differ is."""
    top = str(tmp_path)
    assert "no results.json" in refused(capsys, top)
    first = write(tmp_path, "a", results(0))
    forked = results(1, start_task=1, print_freq=7)
    forked["tasks"][1]["replay_images"] += 1  # which of the stored ones have a class of the task is the seed's
    second = write(tmp_path, "a", forked)
    assert run_main(report.main, [top]) == 0 and table(tmp_path)["a"]["n"] == "2"
    assert "no such row; did you mean 'a'?" in refused(capsys, top, "--rows", "aa")
    second.write_text(json.dumps(results(1, lr=0.3)))
    said = refused(capsys, top)
    assert str(first) in said and str(second) in said and "lr differs (0.1, 0.3)" in said
    fewer = results(1)
    fewer["tasks"][1]["train_images"] = 19
    second.write_text(json.dumps(fewer))
    assert "train_images a task differs ([20, 20], [20, 19]): only runs" in refused(capsys, top)
    fewer["tasks"][0]["classes"], fewer["tasks"][1]["classes"] = [1], [0]
    second.write_text(json.dumps(fewer))
    assert "made with another --seed; make the tasks of all runs with the same --seed" in refused(capsys, top)
    for path, run in ((first, results(0)), (second, fewer)):  # so says a grid with task_seed = "seed"
        path.write_text(json.dumps(run | {"grid_tasks": {"num_tasks": 2, "task_seed": "seed"}}))
    assert run_main(report.main, [top]) == 0 and table(tmp_path)["a"]["n"] == "2"
    assert "training images a task: 20, 19 to 20 (a class" in (tmp_path / "report.md").read_text()
    first.write_text(json.dumps(results(0)))
    second.write_text(json.dumps(results(0)))
    assert "both have seed 0" in refused(capsys, top)
    second.write_text(json.dumps(results(1) | {"quantization_error": [["x"]]}))
    assert "quantization_error" in refused(capsys, top)


def test_same_settings_under_two_names(tmp_path):
    """Equal but for the seed: one row; with a seed in common: a row each."""
    write(tmp_path, "a", results(0))
    second = write(tmp_path, "b", results(1))
    assert run_main(report.main, [str(tmp_path)]) == 0 and table(tmp_path)["a + b"]["n"] == "2"
    second.write_text(json.dumps(results(0)))
    assert run_main(report.main, [str(tmp_path)]) == 0 and list(table(tmp_path)) == ["a", "b"]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is missing")
def test_same_bytes(tmp_path, monkeypatch):
    """The same files from the same results wherever they lie, pictures included; no path of this machine in them."""
    monkeypatch.setattr(report, "find_spec", find_spec)
    written = []
    for place in ("one", "another/place"):
        for seed in (1, 0) if place == "one" else (0, 1):
            write(tmp_path / place, "row", results(seed, 40 + seed))
        out = tmp_path / "out" / place
        assert run_main(report.main, [str(tmp_path / place), "--latex", "--out", str(out)]) == 0
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1] and len(written[0]) == 10
    assert not any(str(tmp_path).encode() in content for content in written[0].values())
    assert all(name in written[0]["report.md"].decode() for name in written[0] if name.endswith(".png"))
