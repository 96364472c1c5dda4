"""Whole command lines: those of the original in their order, sources, --test_only, and a model that is loaded again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equal import read, same
from support.tiny import SIDE, Tiny, arguments, settings, train, write_csvs

import lifequant
from lifequant import options
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint, source
from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.data import dataset, image_root
from lifequant.data.create.replay import main_replay
from lifequant.data.task_csv import read_rows
from lifequant.models.build import build
from lifequant.training import task_end

ORIGINAL = [
    'main.py --csv_dir data/ --job_dir "experiment/ours/resnet/t_4bit_pre32bit" --method "ours" --source_dir "pretrained" '
    '--source_file "res20_32bit/model_best.pt" --arch resnet --bitW 4 --abitW 4 --target_model "resnet20_quant" '
    '--source_model "resnet20" --lt_gamma 10 --num_epochs 50 --train_batch_size 128 --eval_batch_size 100 --lr 0.04',
    "main.py --gpus 0 --csv_dir data/cifar100_025/ --method lifeq --lr 0.001 --num_tasks 1 "
    "--job_dir pretrained/resnet/t_32_025_0 --pretrained False --bitW 32 --abitW 32",
    "main.py --gpus 0 --csv_dir data/cifar100_025/ --method life_q --ll_method ours --balanced True --lr 0.001 "
    "--num_tasks 1 --job_dir experiment/life_q/ours_/resnet/t_8_32_025_0 --source_dir pretrained/ "
    "--source_file resnet/t_32_025_0/checkpoint/model_best.pt --bitW 8 --abitW 8",
    "main.py --gpus 0 --csv_dir data/cifar100_025/ --method life_q --ll_method ours --balanced True --num_tasks 3 "
    "--job_dir experiment/life_q/ours_/resnet/t_4_8_025_3 --source_dir experiment/ "
    "--source_file life_q/ours_/resnet/t_8_32_025_0/checkpoint/model_best.pt --bitW 4 --abitW 4",
]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run of ``ours`` on two tasks."""
    job = tmp_path_factory.mktemp("finished") / "run"
    train(tiny, job, method="ours")
    return job


def test_original_command_lines(tiny, tmp_path, monkeypatch, capsys):
    """In the original's order and folders; the images and fewer epochs apart, nothing is changed."""
    monkeypatch.chdir(tmp_path)
    write_csvs(tiny.images, Path("data"), "cifar10", 3, 25)
    write_csvs(tiny.images, Path("data/cifar100_025"), "cifar100", 3, 25)
    more = ["--data_dir", str(tiny.images), "--num_epochs", "1", "--image_size", str(SIDE), "--compile", "off"]
    first, *rest = (shlex.split(line)[1:] + more for line in ORIGINAL)

    assert run_main(command, first) == 2
    error = capsys.readouterr().err
    (made_by,) = re.findall(r"this makes a 32-bit one: lifequant (.*)\n", error)
    assert command(shlex.split(made_by) + more) == 0
    assert command(first) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "converted to 4-bit weights and 4-bit activations (proxq)" in out and "--lt_gamma 10: " in out
    found = read(Path("experiment/ours/resnet/t_4bit_pre32bit"))
    config = found["config"]
    assert (config["lt_gamma"], config["lr"], config["train_batch_size"], config["pretrained"]) == (10, 0.04, 128, True)
    assert len(found["top1"]) == 3 and sum(task["train_images"] for task in found["tasks"]) < 3 * 32

    for argv, bits, tasks in zip(rest, (32, 8, 4), (1, 1, 3), strict=True):
        assert command(argv) == 0
        folder = Path(argv[argv.index("--job_dir") + 1])
        assert (folder / "model_best.pt").is_file() and (folder / "checkpoint" / "model_best.pt").is_file()
        found = read(folder)
        assert (found["config"]["method"], found["config"]["quantizer"]) == ("ours", "proxq")
        assert found["config"]["bitW"] == found["config"]["abitW"] == bits and len(found["top1"]) == tasks
        assert len(checkpoint.read(folder / "model_best.pt", "model")["class_names"]) == 6  # one task ran, six classes
        converted = f"converted to {bits}-bit" in capsys.readouterr().out
        assert converted == (bits < 32)


def loaded(tiny: Tiny, said: list[str] | None = None, **more: Any) -> dataset.DataSet:
    config = options.make(**settings(tiny, Path("unused"), **more))
    return dataset.load_dataset(config, torch.device("cpu"), (said if said is not None else []).append)


def test_prefix(tiny, tmp_path):
    """--dataset's, else the only one present."""
    folder = shutil.copytree(tiny.csvs, tmp_path / "csvs")
    assert loaded(tiny, csv_dir=folder).prefix == "tiny"
    write_csvs(tiny.images, tmp_path / "other", "other", 3, 25)
    for path in (tmp_path / "other").glob("other_*"):
        shutil.copy(path, folder / path.name)
    with pytest.raises(UserError, match="other and tiny"):
        loaded(tiny, csv_dir=folder)
    assert len(loaded(tiny, csv_dir=folder, dataset="other").ids) == 3
    assert len(loaded(tiny, csv_dir=folder, dataset="tiny").ids) == 2


def test_tasks(tiny):
    """All of them, the first ones, or one alone, which keeps its number."""
    assert loaded(tiny, csv_dir=tiny.csvs3).ids == [0, 1, 2]
    assert loaded(tiny, csv_dir=tiny.csvs3, num_tasks=2).ids == [0, 1]
    assert loaded(tiny, csv_dir=tiny.csvs3, task_id=2).ids == [2]


def test_lt_gamma_once(tiny, tmp_path):
    """Not again where the CSVs were made so; another value there is a contradiction."""
    folder = shutil.copytree(tiny.csvs, tmp_path / "csvs")
    record = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**record, "lt_gamma": 4.0}))
    said: list[str] = []
    for more in ({}, {"lt_gamma": 4}):
        assert len(loaded(tiny, said, csv_dir=folder, **more).train.paths) == 48
    assert len(said) == 1 and "not thinned again" in said[0]
    with pytest.raises(UserError, match="made with 4"):
        loaded(tiny, csv_dir=folder, lt_gamma=5)


def test_replay_csvs_are_what_a_run_samples(tiny, tmp_path, monkeypatch):
    """The generator's choice at the default rate and seed is the run's own."""
    folder = shutil.copytree(tiny.csvs3, tmp_path / "csvs")
    assert main_replay(["--data_dir", str(folder)]) == 0
    named, sampled = loaded(tiny, csv_dir=folder), loaded(tiny, csv_dir=tiny.csvs3)
    assert named.replay_csv is not None and sampled.replay_csv is None
    config = options.make(**settings(tiny, Path("unused")))
    for place in range(3):
        assert torch.equal(*(found.task(place, config).replay for found in (named, sampled)))


def test_image_root(tiny, tmp_path, monkeypatch):
    """--data_dir, else dataset.json's, else data_dir/<prefix> at the top of the clone."""
    assert len(loaded(tiny, data_dir=None).train.paths) == 48
    folder = shutil.copytree(tiny.csvs, tmp_path / "csvs")
    (folder / "dataset.json").unlink()
    monkeypatch.setattr(image_root, "TOP", tmp_path)
    with pytest.raises(UserError, match=r"72 of 72 images are missing in .*data_dir/tiny.*lifequant images"):
        loaded(tiny, csv_dir=folder, data_dir=None)
    shutil.copytree(tiny.images, tmp_path / "data_dir" / "tiny")
    assert len(loaded(tiny, csv_dir=folder, data_dir=None).train.paths) == 48


def test_sources(tiny, finished, tmp_path, capsys):
    """Found beside or in checkpoint/; loaded as it is where bits and quantizer agree, else converted, and said."""
    folder = tmp_path / "source"
    (folder / "checkpoint").mkdir(parents=True)
    weights = checkpoint.read(finished / "model_best.pt", "model")["model"]
    for here, named in (("model_best.pt", "checkpoint/model_best.pt"), ("checkpoint/model_best.pt", "model_best.pt")):
        shutil.copy(finished / "model_best.pt", folder / here)
        flags = {"source_dir": tmp_path, "source_file": f"source/{named}"}
        config = options.make(**settings(tiny, tmp_path / "unused", **flags))
        model = build(config, 6)
        assert source.load_source(checkpoint.find_model(folder / named), config, model, 6)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        (folder / here).unlink()
    shutil.copy(finished / "model_best.pt", folder)
    flags = {"source_file": folder / "model_best.pt", "num_tasks": 1, "lr": 1e-9}
    for more, text in (({}, None), ({"bitW": 8}, "8-bit weights"), ({"bitW": 4, "quantizer": "lsq"}, "(lsq)")):
        capsys.readouterr()
        train(tiny, tmp_path / "run", reset=True, **flags, **more)
        out = capsys.readouterr().out
        assert (text is None or text in out) and ("converted" in out) == (text is not None)
        state = checkpoint.read(tmp_path / "run" / "model_best.pt", "model")["model"]
        torch.testing.assert_close(state["layer2.0.conv1.weight"], weights["layer2.0.conv1.weight"])
    latent = weights["layer2.0.conv1.weight"].abs()  # the step is derived anew, from the source's weights
    step = min(2 * latent.mean().item() / 7**0.5, latent.max().item() / 7)
    assert state["layer2.0.conv1.weight_quant.step_size"].item() == pytest.approx(step, rel=1e-4)
    train(tiny, tmp_path / "unused", pretrained=False, source_file="nowhere", num_tasks=1)


def test_load(tiny, finished):
    """lifequant.load() predicts, image by image from its file, with the accuracy that results.json states."""
    found, model = read(finished), lifequant.load(finished)
    assert not model.training and model.class_names == ["ant", "bee", "cow", "dog", "eel", "fox"]
    for task in range(2):
        rows = read_rows(tiny.csvs / f"tiny_test{task}.csv")
        with torch.no_grad():
            right = [model(model.preprocess(tiny.images / image)).argmax().item() == label for image, label in rows]
        assert 100 * sum(right) / len(right) == pytest.approx(found["top1"][-1][task])
    with pytest.raises(UserError, match="no such model"):
        lifequant.load(tiny.images)


def outcome(argv: list[str], capsys: pytest.CaptureFixture) -> tuple[list[list[float]], str]:
    """The rows of --test_only's table (Class-IL, Task-IL, top-5), the last one the average; and all that is said."""
    capsys.readouterr()
    assert command([*argv, "--test_only"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^(?:task \d|average) +([\d.]+) +([\d.]+) +([\d.]+)$", out, re.MULTILINE)
    return [[float(value) for value in row] for row in rows], out


def test_test_only(tiny, finished, tmp_path, capsys):
    """Needs the run's folder alone, or a model's file: all settings are the run's. It writes and trains nothing."""
    found = read(finished)
    before = sorted(finished.rglob("*"))
    for argv in (["--job_dir", str(finished)], ["--source_file", str(finished / "checkpoint" / "model_best.pt")]):
        rows, out = outcome(argv, capsys)
        by_task = [
            list(row) for row in zip(*(found[name][-1] for name in ("top1", "top1_masked", "top5")), strict=True)
        ]
        assert rows == [
            pytest.approx(row, abs=0.006) for row in [*by_task, [sum(c) / 2 for c in zip(*by_task, strict=True)]]
        ]
        assert "Class-IL" in out and "Task-IL" in out and "of no effect" not in out and "other than" not in out
    argv = arguments({**settings(tiny, finished), "bitW": 2, "quantizer": "lsq", "num_tasks": 1, "image_size": 32})
    argv += ["--act_quantizer", "proxq", "--proxq_c", "7"]
    rows, out = outcome(argv, capsys)
    assert rows[0] == pytest.approx([found[name][-1][0] for name in ("top1", "top1_masked", "top5")], abs=0.006)
    lost, kept = " ".join(out.split()).split("other than in the model's run: ")
    assert lost.startswith("of no effect") and max(map(len, out.splitlines()[:-1])) <= 80
    assert all(
        text in lost
        for text in ("--bitW 2 (its run: 4)", "--quantizer lsq (its run: proxq)", "--image_size 32", "--proxq_c 7")
    )
    assert len(rows) == 2 and "--num_tasks 1 (its run: not given)" in kept
    assert sorted(finished.rglob("*")) == before


def test_test_only_elsewhere(tiny, finished, tmp_path, capsys, monkeypatch):
    """The run's relative paths begin where its own folder's path does; what is gone is named."""
    job = tmp_path / "work" / "experiment" / "run"
    shutil.copytree(finished, job)
    csvs = shutil.copytree(tiny.csvs, tmp_path / "work" / "csvs")
    config = json.loads((job / "config.json").read_text()) | {"csv_dir": "csvs", "job_dir": "experiment/run"}
    (job / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(job)
    assert outcome(["--job_dir", "."], capsys)[0] == outcome(["--job_dir", str(finished)], capsys)[0]
    shutil.rmtree(csvs)
    assert run_main(command, ["--test_only", "--job_dir", "."]) == 2
    assert "config.json says the task CSVs are in csvs, which is not there" in capsys.readouterr().err
    rungs = shutil.copytree(finished, tmp_path / "bits" / "4bit").parent
    assert run_main(command, ["--test_only", "--job_dir", str(rungs)]) == 2
    assert f"(--job_dir {rungs / '4bit'} has one)" in capsys.readouterr().err
    (job / "config.json").write_text("[]")
    assert run_main(command, ["--test_only", "--job_dir", "."]) == 2
    assert "not the settings of a run" in capsys.readouterr().err


def test_what_is_said(tiny, tmp_path, capsys):
    """Flags without effect are said once, on the terminal and in the log; the last epoch is the result."""
    train(tiny, tmp_path / "run", method="original", num_tasks=1, stage=1, lam=3)
    out, log = capsys.readouterr().out, (tmp_path / "run" / "logger.log").read_text()
    for text in ("--stage has no effect", "--lam has no effect", "model_best.pt is the last epoch's model"):
        assert out.count(text) == log.count(text) == 1
    best, last = (checkpoint.read(tmp_path / "run" / "checkpoint" / name, kind)["model"]
                  for name, kind in (("model_best.pt", "model"), ("last.pt", "run")))  # fmt: skip
    assert all(torch.equal(best[name], last[name]) for name in last)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data_dir"] == str(tiny.images) and config["job_dir"] == str(tmp_path / "run")
    assert (
        max(
            len(line)
            for line in out.split("\n")
            if ("accuracy" in line or "task " in line) and not line.startswith("warning")
        )
        <= 80
    )


def test_seed(tiny, tmp_path):
    """Rules everything random: the same seed, the same run; another, another."""
    for job, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny, tmp_path / job, method="replay", num_tasks=1, seed=seed)
    a, b, c = (checkpoint.read(tmp_path / job / "model_best.pt", "model") for job in "abc")
    same(a, b)
    assert not torch.equal(a["model"]["conv1.weight"], c["model"]["conv1.weight"])


def test_val_fraction_chooses_an_epoch(tiny, tmp_path, monkeypatch, capsys):
    """The model of the epoch that is best on held-out images, the first of equals, is the result."""
    seen: list[dict[str, torch.Tensor]] = []

    def top1(model: torch.nn.Module, *args: Any) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return [20.0, 60.0, 60.0, 10.0][len(seen) - 1]

    monkeypatch.setattr(task_end, "validation_top1", top1)
    train(tiny, tmp_path / "run", method="original", num_tasks=1, num_epochs=4, val_fraction=0.25)
    found = checkpoint.read(tmp_path / "run" / "model_best.pt", "model")["model"]
    assert len(seen) == 4 and not torch.equal(seen[1]["fc.weight"], seen[2]["fc.weight"])
    assert all(torch.equal(found[name], value) for name, value in seen[1].items())
    out = capsys.readouterr().out
    assert "the model of epoch 2 is kept: 60.00 %" in out and "is the last epoch's model" not in out
