"""What TensorBoard shows of a run, read back by its own reader."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny import arguments, settings, train

from lifequant.__main__ import train as command
from lifequant.results import results
from lifequant.results.table import table
from lifequant.runtime.tensorboard import matrix_picture
from lifequant.training import history

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

TRAIN_TAGS = {"loss/all", "loss/task", "loss/penalty", "accuracy/train_top1", "accuracy/train_top5", "lr"}
Curves = dict[str, dict[str, list[tuple[int, float]]]]


def read(folder: Path) -> dict[str, accumulator.EventAccumulator]:
    """Of every run below ``folder``, all that was written."""
    found = {}
    for place in sorted({path.parent for path in folder.rglob("events.*")}):
        events = accumulator.EventAccumulator(str(place), {"scalars": 0, "images": 0, "histograms": 0})
        found[place.relative_to(folder).as_posix()] = events.Reload()
    return found


def curves(folder: Path) -> Curves:
    """{run: {tag: [(step, value)]}}, speeds apart."""
    return {
        name: {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not tag.startswith("speed/")
        }
        for name, events in read(folder).items()
    }


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory) -> Path:
    """Three tasks of 4, 5 and 5 steps, read every second step."""
    folder = tmp_path_factory.mktemp("board") / "run"
    train(tiny, folder, method="ours", csv_dir=tiny.csvs3, print_freq=2)
    return folder


def test_curves(job):
    """One run a task: training over its steps, tests over the tasks, step sizes, codes, histograms once."""
    found = curves(job / "run")
    assert set(found) == {".", *(f"task{t}{part}" for t in range(3) for part in ("", "/test"))}
    matrix = results.read(job)["top1"]
    for task in range(3):
        mine = found[f"task{task}"]
        steps = [2, 4] if task == 0 else [2, 4, 5]
        assert set(mine) >= TRAIN_TAGS
        for name in TRAIN_TAGS:
            assert [step for step, _ in mine[name]] == steps, name
        for (_, loss), (_, part), (_, penalty) in zip(
            *(mine[f"loss/{name}"] for name in ("all", "task", "penalty")), strict=True
        ):
            assert loss == pytest.approx(part + penalty, rel=1e-5) and (penalty > 0) == (task > 0)
        assert len([tag for tag in mine if tag.startswith("quantizer_step_size/")]) == 40
        used = [values for tag, values in mine.items() if tag.startswith("quantizer_codes_used/")]
        assert len(used) == 20 and all(len(values) == 1 and 0 < values[0][1] <= 1 for values in used)
        tests = found[f"task{task}/test"]["accuracy/test_top1"]
        assert tests == [(t, pytest.approx(matrix[t][task])) for t in range(3)]
    events = read(job / "run")["task1"]
    assert events.Tags()["scalars"].count("speed/images_per_second") == 1
    histograms = [tag for tag in events.Tags()["histograms"] if tag.startswith("weights/")]
    assert len(histograms) == 20 and all(len(events.Histograms(tag)) == 1 for tag in histograms)


def test_matrix_and_hparams(job):
    """The accuracy matrix as a picture; settings and final metrics in the same run, for the hparams tab."""
    root, summary = read(job / "run")["."], results.read(job)
    (picture,) = root.Images("accuracy/matrix")
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert (pixels == matrix_picture(summary["top1"])).all()
    metrics = {tag: root.Scalars(tag)[-1].value for tag in root.Tags()["scalars"]}
    assert metrics["final/average_accuracy"] == pytest.approx(summary["average_accuracy"])
    assert metrics["final/forgetting"] == pytest.approx(summary["forgetting"])
    plugins = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    content = root.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = plugins.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["method"].string_value == "ours" and settings["ll_lambda"].number_value == 3


def test_matrix_picture():
    """A cell a value, darker where it is higher."""
    picture = matrix_picture([[90.0, 10.0]], cell=72)
    assert picture.shape == (2 * 72, 3 * 72, 3)
    low, high = picture[76, 2 * 72 + 4], picture[76, 72 + 4]
    assert high[0] < low[0] and high[2] == low[2] == 255


@pytest.mark.parametrize("call", [3, 4, 7, 10])
def test_resumed_curves(call, job, tiny, tmp_path, monkeypatch):
    """No point twice, none missing: killed after a reading, before one, in the second and at the third task's begin."""

    def dying(*args, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == call:
            raise KeyboardInterrupt
        return results_step_sums(*args)

    results_step_sums = history.step_sums
    more = {"method": "ours", "csv_dir": tiny.csvs3, "print_freq": 2, "checkpoint_seconds": 0}
    argv = arguments(settings(tiny, tmp_path / "run", **more))
    with monkeypatch.context() as patch:
        patch.setattr(history, "step_sums", dying)
        with pytest.raises(KeyboardInterrupt):
            command(argv)
    assert command([*argv, "--resume"]) == 0
    assert curves(tmp_path / "run" / "run") == curves(job / "run")


def test_curves_of_a_repeated_evaluation(job, tiny, tmp_path, monkeypatch):
    """Killed between a task's evaluation and its checkpoint, which writes the tests of that task once more."""
    more = {"method": "ours", "csv_dir": tiny.csvs3, "print_freq": 2, "checkpoint_seconds": 0}
    argv = arguments(settings(tiny, tmp_path / "run", **more))
    with monkeypatch.context() as patch:
        patch.setattr(results, "warn_of", lambda run, place: 1 / (1 - place))  # in task 1
        with pytest.raises(ZeroDivisionError):
            command(argv)
    assert command([*argv, "--resume"]) == 0
    assert curves(tmp_path / "run" / "run") == curves(job / "run")


def test_table_fits_the_terminal(job):
    """80 columns, also with twelve tasks; the last task's column is always there."""
    summary = results.read(job)
    many = {**summary, "tasks": [{"id": t} for t in range(12)]}
    many |= {"top1": [[float(i + t) for i in range(12)] for t in range(12)]}
    many["top1_masked"] = many["top1"]
    for content in (summary, many):
        lines = table(content).split("\n")
        assert max(map(len, lines)) <= 80
        assert f"{content['top1'][-1][-1]:.2f}" in "".join(lines)
