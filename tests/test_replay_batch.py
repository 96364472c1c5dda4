"""--replay_batch: stored images beside the new ones, against what is counted by hand and a plain training loop."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny import train

import lifequant.train as training
from lifequant.data.replay import epoch_of
from lifequant.data.task import Batch, Task, batch_parts


@pytest.mark.parametrize(
    ("size", "share", "new", "stored", "parts"),
    [
        (128, 0.5, 1000, 200, (64, 64)),
        (128, 0.25, 1000, 200, (96, 32)),
        (128, 0.5, 1000, 40, (88, 40)),  # none twice in a batch
        (128, 0.5, 1000, 2200, (40, 88)),  # 11 of 16 are stored, more than half
        (128, 0.01, 1000, 200, (107, 21)),
        (128, 0.5, 10, 200, (6, 122)),
        (2, 0.9, 5, 200, (1, 1)),
        (128, 0.3, 1, 9, (1, 9)),
        (128, 0.5, 1000, 0, (128, 0)),  # task 0
        (128, 0.0, 100, 20, (120, 0)),  # one pool
    ],
)
def test_parts(size, share, new, stored, parts):
    assert batch_parts(size, share, new, stored) == parts
    assert sum(batch_parts(size, share, new, stored, multiple=2)) % 2 == 0


def task_with(new: int, stored: int, share: float, size: int) -> Task:
    """Classes 0 and 1 are stored, one and two thirds of the store; 2 and 3 are new."""
    labels = torch.tensor([min(i % 3, 1) for i in range(stored)] + [2 + i % 2 for i in range(new)])
    images, rows = torch.zeros(len(labels), 3, 1, 1), torch.arange(len(labels))
    return Task(1, [2, 3], images, labels, rows[stored:], rows[:stored], rows[:stored], 5, size, stored,
                replay_batch=share)  # fmt: skip


@pytest.mark.parametrize("sampler", ["uniform", "ball"])
def test_an_epoch(sampler):
    """A pass over the new images and passes over the store; half of a batch is stored images, in each half of it, too."""
    task, parts = task_with(1000, 90, 0.5, 64), (32, 32)
    epochs = [epoch_of(task, parts, sampler, torch.Generator().manual_seed(seed)) for seed in range(40)]
    drawn: Counter[int] = Counter()
    for epoch in epochs:
        assert epoch.rows.shape == (32, 64) and torch.equal(epoch.is_replay, epoch.rows < 90)
        assert (epoch.is_replay.view(32, 2, 32).sum(2) == 16).all()
        assert torch.equal(epoch.y, task.labels[epoch.rows])
        drawn.update(epoch.y.flatten().tolist())
        if sampler == "uniform":
            assert all(len(set(batch.tolist())) == 64 for batch in epoch.rows)
            new = epoch.rows[~epoch.is_replay].tolist()
            assert sorted(new[:1000]) == list(range(90, 1090)) and new[1000:] == new[:24]
            times = Counter(epoch.rows[epoch.is_replay].tolist())
            assert len(times) == 90 and max(times.values()) <= 16  # of 16 passes, each without the last 26 of its order
    counts = task.counts.tolist()
    assert counts == pytest.approx(
        [1000 / 3, 2000 / 3, 500, 500, 0]
    )  # 1,000 new images, and as many draws of stored ones
    if sampler == "uniform":
        assert [drawn[label] / 40 for label in range(4)] == pytest.approx(counts[:4], rel=0.03)
    else:  # BaLL's r = 1 / (K p + 1), with p of an epoch's draws: rare classes come more often, among either kind
        r = [1 / (4 * n / 2000 + 1) for n in counts[:4]]
        stored = [30 * r[0], 60 * r[1]]
        assert drawn[0] / (drawn[0] + drawn[1]) == pytest.approx(stored[0] / sum(stored), abs=0.01)
    again = epoch_of(task, parts, sampler, torch.Generator().manual_seed(0))
    assert torch.equal(again.rows, epochs[0].rows) and not torch.equal(again.rows, epochs[1].rows)


def test_a_step_of_er(tiny, tmp_path, monkeypatch):
    """Experience replay as in Mammoth and Avalanche: one mean of the cross entropy over new and stored images, then SGD."""
    found: dict[str, Any] = {}
    step = training.training_step

    def training_step(run: Any, batch: Batch, factor: float) -> Any:
        compared = run.task_index == 1 and "after" not in found
        if compared:
            model, lr = copy.deepcopy(run.model), factor * run.config.lr
            assert batch.is_replay.sum() == 4 and len(batch.y) == 8
            before = dict(model.named_parameters())
            new, stored = (batch.x[kind] for kind in (~batch.is_replay, batch.is_replay))
            loss = F.cross_entropy(
                model(torch.cat([new, stored])), torch.cat([batch.y[~batch.is_replay], batch.y[batch.is_replay]])
            )
            slopes = torch.autograd.grad(loss, list(before.values()))
            expected = {name: w.detach() - lr * g for (name, w), g in zip(before.items(), slopes, strict=True)}
        sums = step(run, batch, factor)
        if compared:
            found["after"] = {name: w.detach().clone() for name, w in run.model.named_parameters()}
            for name, weight in found["after"].items():
                torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
        return sums

    monkeypatch.setattr(training, "training_step", training_step)
    results = train(tiny, tmp_path / "run", method="replay", bitW=32, weight_decay=0, momentum=0)
    assert "after" in found and results["config"]["replay_batch"] == 0.5
