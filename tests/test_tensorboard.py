"""What TensorBoard shows of a run, read back by its own reader."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.equal import read as read_results
from support.equal import same
from support.tiny import arguments, settings, train

from lifequant import options
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.qat.code_usage import CodeCounts
from lifequant.quantizers.lsq import LSQWeight
from lifequant.results import curves, results, tensorboard_settings
from lifequant.results.table import table
from lifequant.results.tensorboard_pictures import codes_picture, matrix_picture
from lifequant.training import history
from lifequant.training.schedule import evaluation_interval, reading_interval

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
layouts = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")

MORE = {"method": "ours", "num_epochs": 2, "print_freq": 2}  # three tasks of 8, 10 and 10 steps
ENDS, WITHIN = [8, 18, 28], [4, 13, 23]  # steps at which tasks and their first epochs end
READ = [2, 4, 6, 8, *range(10, 29, 2)]


def read(job: Path) -> Any:
    """All that was written of a run, in one TensorBoard run."""
    assert len({path.parent for path in job.rglob("events.*")}) == 1
    events = accumulator.EventAccumulator(
        str(job / "run"), dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    )
    return events.Reload()


def points(events: Any) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]}, speeds apart."""
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("5_speed/")
    }


def everything(events: Any) -> dict[str, Any]:
    """Points, pictures, histograms and texts; the command and the settings apart, which name the run's place."""
    tags = events.Tags()
    images = {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]}
    histograms = {tag: [(e.step, e.histogram_value) for e in events.Histograms(tag)] for tag in tags["histograms"]}
    tensors = {tag: [(e.step, e.tensor_proto) for e in events.Tensors(tag)] for tag in tags["tensors"]}
    texts = {tag: [(s, p.string_val) for s, p in v] for tag, v in tensors.items() if tag[0] not in "23"}
    return {"points": points(events), "images": images, "histograms": histograms, "texts": texts}


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("board") / "run"
    train(tiny, folder, csv_dir=tiny.csvs3, eval_every=1, **MORE)
    return folder


def test_curves(job):
    """Over the steps of all tasks: training, accuracies and forgetting also within tasks, scales, codes."""
    events, found = read(job), results.read(job)
    all_points = points(events)
    for tag, values in all_points.items():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps)), tag
    losses = [all_points[f"3_loss/{name}"] for name in ("all", "task", "penalty")]
    for (step, loss), (_, part), (_, penalty) in zip(*losses, strict=True):
        assert loss == pytest.approx(part + penalty, rel=1e-5) and (penalty > 0) == (step > ENDS[0])
    for tag in ("1_accuracy/train_top1", "3_loss/all", "4_learning_rate", "9_more_accuracy/train_top5"):
        assert [step for step, _ in all_points[tag]] == READ, tag
    R, masked, both = found["top1"], found["top1_masked"], sorted(ENDS + WITHIN)
    for i in range(3):
        for tag, matrix in ((f"1_accuracy/test_task{i}", R), (f"9_more_accuracy/task_il_task{i}", masked)):
            assert [step for step, _ in all_points[tag]] == both
            assert [v for step, v in all_points[tag] if step in ENDS] == pytest.approx([row[i] for row in matrix])
    for tag, matrix in (("1_accuracy/average_class_il", R), ("1_accuracy/average_task_il", masked)):
        ends = [np.mean(row[: t + 1]) for t, row in enumerate(matrix)]
        assert [v for step, v in all_points[tag] if step in ENDS] == pytest.approx(ends)
    assert all_points["1_accuracy/average_class_il"][-1][1] == pytest.approx(found["average_accuracy"])
    assert [step for step, _ in all_points["2_forgetting/average"]] == [s for s in both if s > ENDS[0]]
    assert all_points["2_forgetting/average"][-1][1] == pytest.approx(found["forgetting"])
    assert all_points["2_forgetting/task0"][0][1] == pytest.approx(R[0][0] - all_points["1_accuracy/test_task0"][2][1])
    assert [step for step, _ in all_points["2_forgetting/task1"]] == [23, 28]
    assert [step for step, _ in all_points["9_memory_kB"]] == ENDS
    assert all_points["9_memory_kB"][-1][1] == pytest.approx(sum(found["memory_bytes"].values()) / 1000)
    assert len([tag for tag in all_points if tag.startswith("6_quantizer_scales/")]) == 40
    used = [values for tag, values in all_points.items() if tag.startswith("7_quantizer_codes/used/")]
    assert len(used) == 40 and all(len(values) == 3 and 0 < values[-1][1] <= 1 for values in used)
    weights = [tag for tag in events.Tags()["histograms"] if tag.startswith("weights/")]
    assert len(weights) == 20 and all(len(events.Histograms(tag)) == 3 for tag in weights)


def test_what_is_shown_of_the_settings(job):
    """Pictures, texts, the line in the hparams tab and the page of custom scalars."""
    events, found = read(job), results.read(job)
    pictures = events.Images("1_accuracy/matrix")
    assert [picture.step for picture in pictures] == ENDS
    for t, picture in enumerate(pictures):
        pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
        assert pixels.shape[1] >= 800 and (pixels == matrix_picture(found["top1"][: t + 1], [0, 1, 2])).all()
    assert [picture.step for picture in events.Images("7_quantizer_codes/bars")] == ENDS
    names = ("1_results", "2_command", "3_settings", "4_versions")
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in names}
    assert texts["1_results"] == f"```\n{table(found)}\n```"
    assert "| **num_epochs** | **2** |" in texts["3_settings"] and "| sampler | ball |" in texts["3_settings"]
    assert torch.__version__ in texts["4_versions"] and "python" in texts["2_command"]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    mine = hparams.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (mine["1_method"].string_value, mine["3_quantizer"].string_value) == ("ours", "proxq")
    assert (mine["2_bits"].string_value, mine["4_seed"].string_value) == ("4/4", "0")
    assert mine["ll_lambda"].number_value == 3
    assert "buffer_size" not in mine  # it is not given
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    experiment = hparams.HParamsPluginData.FromString(content).experiment
    assert {info.name for info in experiment.hparam_infos} == set(tensorboard_settings.columns(options.make()))
    assert all(info.name.tag in events.Tags()["scalars"] for info in experiment.metric_infos)
    raw = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    (page,) = layouts.Layout.FromString(raw).category
    assert page.title == "LifeQuant" and len(page.chart) == 3


@pytest.mark.parametrize("call", [4, 5, 19])
def test_resumed_curves(call, job, tiny, tmp_path, monkeypatch):
    """Nothing twice, nothing missing: killed before an evaluation, after one, and at the begin of task 2."""

    def dying(*args, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == call:
            raise KeyboardInterrupt
        return results_step_sums(*args)

    results_step_sums = history.step_sums
    argv = arguments(settings(tiny, tmp_path / "run", csv_dir=tiny.csvs3, eval_every=1, checkpoint_seconds=0, **MORE))
    with monkeypatch.context() as patch:
        patch.setattr(history, "step_sums", dying)
        with pytest.raises(KeyboardInterrupt):
            command(argv)
    assert command([*argv, "--resume"]) == 0
    assert everything(read(tmp_path / "run")) == everything(read(job))


@pytest.mark.parametrize(
    ("function", "place"), [("warn_of", 1), ("assemble", None)], ids=["between a task's two", "at the run's"]
)
def test_curves_of_a_repeated_end(function, place, job, tiny, tmp_path, monkeypatch):
    """Killed between the evaluation of a task's end and its checkpoint, and at the run's end."""
    original = getattr(results, function)

    def dying(run, *given):
        if not given or given[0] == place:
            raise KeyboardInterrupt
        return original(run, *given)

    argv = arguments(settings(tiny, tmp_path / "run", csv_dir=tiny.csvs3, eval_every=1, checkpoint_seconds=0, **MORE))
    with monkeypatch.context() as patch:
        patch.setattr(results, function, dying)
        with pytest.raises(KeyboardInterrupt):
            command(argv)
    assert command([*argv, "--resume"]) == 0
    assert everything(read(tmp_path / "run")) == everything(read(job))


def test_curves_of_a_run_that_begins_with_another(job, tiny, tmp_path):
    """Its steps go on where the other's ended; the accuracies of the former tasks are there."""
    train(tiny, tmp_path / "run", csv_dir=tiny.csvs3, eval_every=1, start_task=2, **{"from": job}, **MORE)
    forked, whole = points(read(tmp_path / "run")), points(read(job))
    assert forked["3_loss/all"] == [point for point in whole["3_loss/all"] if point[0] > 18]
    for tag in ("1_accuracy/test_task0", "1_accuracy/average_class_il", "2_forgetting/average"):
        assert forked[tag] == [point for point in whole[tag] if point[0] in (8, 18, 23, 28)], tag


def test_one_task_forgets_nothing(tiny, tmp_path):
    train(tiny, tmp_path / "run", method="original", num_tasks=1)
    found = points(read(tmp_path / "run"))
    assert "1_accuracy/average_class_il" in found and not [tag for tag in found if tag.startswith("2_")]


@pytest.mark.parametrize(
    "more",
    [{}, {"ema": 0.9, "track_oscillations": True, "freeze_oscillating": 0.02, "val_fraction": 0.25}],
    ids=["", "more"],
)
def test_evaluation_within_a_task_changes_nothing(more, tiny, tmp_path, monkeypatch):
    """Model, last checkpoint and results.json are the same to the bit; the model that is evaluated is the average."""
    kinds, evaluated = [], []

    def watched(model, *given, **named):
        run = watching[-1]
        kinds.append(run.timer.kind)
        evaluated.append(model is (run.ema.model if run.ema else run.model))
        return original(model, *given, **named)

    original, add, watching = curves.evaluate, curves.evaluate_within, []
    monkeypatch.setattr(curves, "evaluate", watched)
    monkeypatch.setattr(curves, "evaluate_within", lambda run, epoch: (watching.append(run), add(run, epoch)))
    for every in (1, 1000):
        train(tiny, tmp_path / str(every), eval_every=every, **{**MORE, "num_epochs": 3}, **more)
        if every == 1:
            assert kinds == ["evaluation"] * 4 and all(evaluated)
    assert len(kinds) == 4
    for name, kind in (("model_best.pt", "model"), ("last.pt", "run")):
        states = [checkpoint.read(tmp_path / str(every) / "checkpoint" / name, kind) for every in (1, 1000)]
        for state in states:
            del state["config"]["eval_every"]
        same(*states, name)
    found = [read_results(tmp_path / str(every)) for every in (1, 1000)]
    for content in found:
        del content["config"]["eval_every"]
    same(*found)


def test_how_often():
    """About 20 evaluations a run that add less than a twentieth; 100 readings a task, at most every 50 steps."""
    for tasks, epochs in ((1, 50), (3, 50), (3, 12), (10, 50), (20, 50), (60, 10), (3, 1)):
        interval = evaluation_interval(options.make(num_epochs=epochs), [10**6 // tasks] * tasks, 1000, True)
        total = tasks * -(-epochs // interval)
        assert total == tasks or 10 <= total <= 20, (tasks, epochs)
    small = options.make(num_epochs=12)  # 1,438 training and 359 test images
    interval = evaluation_interval(small, [432, 435, 571], 359, False)
    extra = 3 * (-(-12 // interval) - 1)
    assert 0 < 359 * extra <= 0.05 * 3 * 12 * 1438
    assert evaluation_interval(small, [432, 435, 571], 359, True) == 12  # 3 evaluations are 1,077 images, 5 % is 862
    assert evaluation_interval(options.make(num_epochs=12, eval_every=5), [432, 435, 571], 359, True) == 5
    assert [reading_interval(small, steps, "cpu") for steps in (50, 1000, 10**5)] == [5, 10, 50]
    assert [reading_interval(small, steps, "cuda") for steps in (50, 1000, 10**5)] == [20, 20, 50]
    assert reading_interval(options.make(print_freq=7), 1000, "cuda") == 7


def test_matrix_picture():
    """A cell a value, darker where it is higher, by the highest value there is; what is not trained yet stays white."""
    for highest in (90.0, 1.0):
        picture = matrix_picture([[highest, highest / 9], [highest / 9, highest]], [0, 1])
        height, width, _ = picture.shape
        assert width == 900 and height < width
        high, low = picture[140, 140], picture[140, 140 + 375]
        assert high.sum() < 250 and low.sum() > 650
    half = matrix_picture([[90.0, 10.0]], [0, 1])
    assert half.shape == picture.shape and (half[140 + 160, 140] == 255).all()
    many = matrix_picture([[float(i) for i in range(20)]] * 20, list(range(20)))
    assert 850 <= many.shape[1] <= 1000
    assert matrix_picture([[0.0]], [3]).shape[1] == 900


def test_codes_picture():
    """Five charts in a row; the highest bar is that of the code that occurs most."""
    quant = LSQWeight(2)
    counts = CodeCounts(quant, quant.qn, torch.tensor([1, 0, 4, 2]))
    picture = codes_picture({f"layer{i}.weight_quant": counts for i in range(6)})
    assert picture.shape == (2 * 60 + 2 * 140, 900, 3)
    blue = (picture[60:200, :180] == (107, 174, 214)).all(2).sum(0)  # of each column of the first chart
    heights = [blue[8 + 41 * code : 8 + 41 * (code + 1)].max() for code in range(4)]
    assert heights[1] == 0 and heights[2] > heights[3] > heights[0] > 0


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
