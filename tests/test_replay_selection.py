"""--replay_selection and --memory_budget: against the papers' formulas, and sums of bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tiny import Tiny, arguments, settings, train

from lifequant import options
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.data.augment import load_batch
from lifequant.data.dataset import load_dataset
from lifequant.evaluation.exemplars import by_loss, herding
from lifequant.evaluation.nearest_mean import features
from lifequant.models.build import build


def icarl(features: np.ndarray, most: int) -> list[int]:
    """Algorithm 4 of iCaRL as it is written, over features that have norm 1."""
    phi = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen: list[int] = []
    for k in range(1, most + 1):
        distances = [
            np.inf if x in chosen else np.linalg.norm(phi.mean(0) - (phi[x] + phi[chosen].sum(0)) / k)
            for x in range(len(phi))
        ]
        chosen.append(int(np.argmin(distances)))
    return chosen


def test_herding():
    points = np.random.default_rng(0).normal(size=(40, 6)) + 1
    assert herding(torch.from_numpy(points), 15) == icarl(points, 15)
    assert sorted(herding(torch.from_numpy(points), 99)) == list(range(40))


def test_by_loss():
    """The first of three is drawn with probability proportional to its loss, and so is the second of those that are left."""
    random, losses = np.random.default_rng(0), torch.tensor([1.0, 2.0, 5.0])
    orders = Counter(tuple(by_loss(losses, random.uniform(size=3))) for _ in range(20_000))
    for (a, b, _), n in orders.items():
        left = 8 - losses[a].item()
        assert n / 20_000 == pytest.approx(losses[a].item() / 8 * losses[b].item() / left, abs=0.015)
    assert by_loss(torch.zeros(2), [0.5, 0.6]) == [1, 0]


def stored_of(job: Path) -> list[list[int]]:
    return [rows.tolist() for rows in checkpoint.read(job / "checkpoint" / "last.pt", "run")["stored"]]


def loaded(tiny: Tiny, job: Path, flags: dict[str, Any]) -> tuple[Any, Any]:
    """(the data set, the network at the end of task 0)."""
    config = options.make(**settings(tiny, job, **flags))
    data = load_dataset(config, torch.device("cpu"), lambda text: None)
    model = build(config, data.num_classes).eval()
    model.load_state_dict(checkpoint.read(job / "checkpoint" / "task0.pt", "run")["model"])
    return data, model


@pytest.mark.parametrize("buffer", [{"buffer_size": 10}, {"replay_rate": 0.3}])
def test_a_run_keeps_the_herd(tiny, tmp_path, buffer):
    """The images of task 0 that stay are the first of the herd of each class; classes have as many as by chance."""
    flags = {"method": "replay", "replay_selection": "herding", "num_epochs": 2, "csv_dir": tiny.csvs3, **buffer}
    job = tmp_path / "run"
    found = train(tiny, job, **flags)
    data, model = loaded(tiny, job, flags)
    stored, by_chance = (
        stored_of(job),
        load_dataset(options.make(**settings(tiny, job, **flags)), torch.device("cpu"), print),
    )
    labels = data.train.labels.tolist()
    for label in data.classes(0):
        rows = torch.tensor([row for row in data.new_rows[0] if labels[row] == label])
        points = features(model, [load_batch(data.train.images, rows, torch.device("cpu"))]).double().numpy()
        mine = [row for row in stored[0] if labels[row] == label]
        assert mine == [rows[i].item() for i in icarl(points, len(mine))] and mine
    gone = set(data.classes(0)) - set(data.classes(1))
    assert gone
    for label in gone:  # shed from the end of its order
        first, second = ([row for row in kept if labels[row] == label] for kept in stored[:2])
        assert second == first[: len(second)] and second
    for tasks in (1, 2, 3):
        expected = Counter(labels[row] for row in by_chance.stored(tasks, options.make(**settings(tiny, job, **flags))))
        assert Counter(labels[row] for row in stored[tasks - 1]) == expected
    assert found["tasks"][2]["stored_images"] == len(stored[1])
    again = train(tiny, tmp_path / "again", **flags)
    assert stored_of(tmp_path / "again") == stored and again["top1"] == found["top1"]


def test_by_loss_in_a_run(tiny, tmp_path):
    """A class's order follows the losses of the network at the task's end, in eval mode."""
    flags = {"method": "replay", "replay_selection": "loss", "buffer_size": 12, "num_tasks": 1}
    train(tiny, tmp_path / "run", **flags)
    data, model = loaded(tiny, tmp_path / "run", flags)
    from lifequant.data.split import ranks

    kept = stored_of(tmp_path / "run")[0]
    labels = data.train.labels
    for label in data.classes(0):
        rows = [row for row in data.new_rows[0] if labels[row] == label]
        with torch.no_grad():
            logits = model(load_batch(data.train.images, torch.tensor(rows), torch.device("cpu")))
        losses = F.cross_entropy(logits, labels[rows], reduction="none").double().numpy()
        uniform = (
            np.array(ranks([data.train.paths[row] for row in rows], 0, "replay"), dtype=np.float64) + 0.5
        ) / 2.0**64
        order = np.argsort(np.log(uniform) / losses)[::-1]
        assert [row for row in kept if labels[row] == label] == [rows[i] for i in order[:3]]


@pytest.mark.parametrize(
    ("flags", "image"),
    [
        ({"method": "replay"}, 768),
        ({"method": "derpp"}, 768 + 2 * 6),
        ({"method": "replay", "distill": 1, "ema": 0.9, "replay_codec": "bits4"}, 384 + 1),
        ({"method": "ours", "quantizer": "lsq", "replay_selection": "herding"}, 768),
    ],
    ids=["replay", "derpp", "teacher and average", "importances"],
)
def test_budget(tiny, tmp_path, flags, image):
    """All that is kept is within the budget, and one more image would not be; old classes shed images as new ones come."""
    budget = sum(train(tiny, tmp_path / "least", **flags, buffer_size=1)["memory_bytes"].values()) + 16 * image + 300
    job = tmp_path / "run"
    found = train(tiny, job, **flags, csv_dir=tiny.csvs3, memory_budget=budget)
    memory = found["memory_bytes"]
    kept = sum(memory.values()) - memory["logits"] - memory["replay"]
    number = found["tasks"][2]["stored_images"]
    assert memory["replay"] == number * (385 if "replay_codec" in flags else 768)
    assert sum(memory.values()) <= budget < kept + (number + 1) * image + 1 and number >= 16
    stored = [Counter(load_dataset_labels(tiny, job, flags)[row] for row in rows) for rows in stored_of(job)]
    assert all(max(classes.values()) - min(classes.values()) <= 3 for classes in stored)
    assert min(stored[0].values()) > max(stored[2].values()) - 1


def load_dataset_labels(tiny: Tiny, job: Path, flags: dict[str, Any]) -> list[int]:
    config = options.make(**settings(tiny, job, **flags, csv_dir=tiny.csvs3))
    return load_dataset(config, torch.device("cpu"), lambda text: None).train.labels.tolist()


def test_over_budget(tiny, tmp_path, capsys):
    """What a method keeps without any image is summed up and refused, before a step is trained."""
    argv = arguments(settings(tiny, tmp_path / "run", method="ewc", memory_budget="1MB"))
    assert run_main(command, argv) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "--memory_budget 1,000,000 bytes: ewc keeps 2," in line
    assert "packed_model 145,640" in line and "importance 1," in line and "reference 1," in line
    assert "epoch 1/1" not in (tmp_path / "run" / "logger.log").read_text()


def test_a_fork_chooses_as_the_straight_run_does(tiny, tmp_path):
    train(tiny, tmp_path / "original", method="original")
    flags = {"method": "replay", "replay_selection": "herding", "memory_budget": "160kB", "replay_code_new": False}
    train(tiny, tmp_path / "straight", **flags)
    found = train(tiny, tmp_path / "fork", **flags, start_task=1, **{"from": tmp_path / "original"})
    assert stored_of(tmp_path / "fork") == stored_of(tmp_path / "straight") and stored_of(tmp_path / "fork")[0]
    assert found["top1"] == train(tiny, tmp_path / "again", **flags)["top1"]
