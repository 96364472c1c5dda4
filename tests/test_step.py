"""THE training step and what surrounds it: batches, noise, optimizer, learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import train

from lifequant import options
from lifequant import train as training
from lifequant.checkpointing import checkpoint
from lifequant.data.task import Task
from lifequant.qat.layers import fake_quants
from lifequant.quantizers.base import STEP_FLOOR
from lifequant.training.schedule import lr_factor


@pytest.fixture
def steps(tiny, tmp_path, monkeypatch) -> list[dict[str, Any]]:
    """What ``ours`` does in two epochs of two tasks, step by step."""
    seen: list[dict[str, Any]] = []
    noises: list[torch.Generator] = []
    orders: list[torch.Generator] = []
    step, batch_of, order_of = training.training_step, Task.training_batch, training.epoch_of

    def training_batch(task: Any, epoch: Any, index: int, noise: torch.Generator) -> Any:
        noises.append(noise)
        batch = batch_of(task, epoch, index, noise)
        seen.append({"task": task, "batch": batch, "noise": noise.initial_seed()})
        return batch

    def epoch_of(task: Any, parts: Any, sampler: str, generator: torch.Generator) -> Any:
        orders.append(generator)
        return order_of(task, parts, sampler, generator)

    def training_step(run: Any, batch: Any, factor: float) -> Any:
        before = [p.detach().clone() for p in run.model.parameters()]
        fresh = not run.optimizer.state
        sums = step(run, batch, factor)
        moved = any(not torch.equal(p, b) for p, b in zip(run.model.parameters(), before, strict=True))
        groups = [
            (g["weight_decay"], g["momentum"], g["lr"], set(map(id, g["params"]))) for g in run.optimizer.param_groups
        ]
        seen[-1] |= {
            "fresh": fresh,
            "moved": moved,
            "groups": groups,
            "model": run.model,
            "sums": sums,
            "factor": factor,
        }
        return sums

    monkeypatch.setattr(Task, "training_batch", training_batch)
    for function in (epoch_of, training_step):
        monkeypatch.setattr(training, function.__name__, function)
    train(tiny, tmp_path / "run", method="ours", quantizer="lsq", num_epochs=2, weight_decay=0.01, lr=0.02, step_lr=0.3)
    seen[0]["orders"] = [generator.initial_seed() for generator in orders]
    return seen


def test_batches(steps):
    """Labels and the mark of replay belong to the rows; replay takes part; the last batch is filled up."""
    marked = 0
    for step in steps:
        task, batch = step["task"], step["batch"]
        assert batch.x.shape == (8, 3, 16, 16) and torch.equal(batch.y, task.labels[batch.rows])
        assert batch.is_replay.tolist() == [row in task.replay.tolist() for row in batch.rows.tolist()]
        assert set(batch.rows.tolist()) <= set(task.pool.tolist())
        marked += int(batch.is_replay.sum())
    assert marked > 0 and len(steps) == 2 * 4 + 2 * 5  # 32 images; 36 with replay


def test_an_epoch_has_each_image_once(tiny, tmp_path, monkeypatch):
    """In one pool: batches of 8 of 36 images, the last filled up with four from the epoch's begin."""
    rows: list[list[int]] = []
    batch_of = Task.training_batch

    def training_batch(*args: Any) -> Any:
        batch = batch_of(*args)
        rows.append(batch.rows.tolist())
        return batch

    monkeypatch.setattr(Task, "training_batch", training_batch)
    train(tiny, tmp_path / "run", method="replay", replay_batch=0)
    first, epoch = ([row for batch in part for row in batch] for part in (rows[:4], rows[4:]))
    assert len(epoch) == 40 and len(set(epoch[:36])) == 36 and epoch[36:] == epoch[:4]
    assert len(first) == len(set(first)) == 32


def test_noise_is_new_at_every_step(steps):
    """No two steps are augmented alike, no two epochs have the same order."""
    noise = [step["noise"] for step in steps]
    assert len(set(noise)) == len(noise)
    orders = steps[0]["orders"]
    assert len(orders) == len(set(orders)) == 4


def test_optimizer(steps):
    """Anew for each task; the rate follows the schedule; step sizes have no weight decay and a rate of their own."""
    assert [place for place, step in enumerate(steps) if step["fresh"]] == [0, 8]
    assert all(step["moved"] for step in steps)
    for step in steps:
        (decayed, *_), (bare, *_) = step["groups"]
        assert (decayed, bare) == (0.01, 0)
        assert all(momentum == 0.9 for _, momentum, _, _ in step["groups"])
        rates = [lr for _, _, lr, _ in step["groups"]]
        assert rates == pytest.approx([0.02 * step["factor"], 0.02 * 0.3 * step["factor"]], rel=1e-12)
        sizes = {id(p) for _, quant in fake_quants(step["model"]) for p in quant.parameters()}
        assert step["groups"][1][3] == sizes and len(sizes) == 40
        assert step["groups"][0][3] == {id(p) for p in step["model"].parameters()} - sizes
    assert [step["factor"] for step in steps[:2]] == [1, pytest.approx(0.962, abs=1e-3)]  # cosine over 8 steps


@pytest.mark.parametrize("share", [None, 0.0])
def test_step_lr(share, tiny, tmp_path, monkeypatch):
    """A step of plain SGD moves weights by lr times the gradient, step sizes by a tenth of that, or --step_lr's share."""
    step, moves = training.training_step, []

    def training_step(run: Any, batch: Any, factor: float) -> Any:
        learned = [p for p in run.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in learned]
        sums = step(run, batch, factor)
        sizes = {id(p) for p in run.scales.parameters}
        moves.extend((id(p) in sizes, p.detach() - b, p.grad.clone()) for p, b in zip(learned, before, strict=True))
        return sums

    monkeypatch.setattr(training, "training_step", training_step)
    more = {} if share is None else {"step_lr": share}
    flags = {"sched": "constant", "momentum": 0, "weight_decay": 0, "lr": 0.01, "num_tasks": 1, **more}
    train(tiny, tmp_path / "run", method="original", quantizer="lsq", **flags)
    assert sum(is_size for is_size, _, _ in moves) == 4 * 40  # steps, quantizers
    for is_size, moved, gradient in moves:
        rate = 0.01 * ((0.1 if share is None else share) if is_size else 1)
        torch.testing.assert_close(moved, -rate * gradient, rtol=1e-3, atol=2e-7)
    for wanted in (True, False):
        most = max(moved.abs().max() for is_size, moved, _ in moves if is_size == wanted)
        assert most > 1e-5 or (wanted and share == 0 and most == 0)


def test_sums(steps):
    """Losses times images, hits, images; the penalty is 0 in task 0."""
    for place, step in enumerate(steps):
        task_loss, penalty, top1, top5, images = step["sums"].tolist()
        assert task_loss > 0 and images == 8 and 0 <= top1 <= top5 <= 8 and top1 == int(top1)
        assert penalty == 0 if place < 8 else penalty >= 0
    assert steps[-1]["sums"][1] > 0


def test_step_sizes_stay_positive(tiny, tmp_path, monkeypatch):
    """One that an update sends below 0 is put back to a floor, which is warned of."""
    step = training.training_step

    def training_step(run: Any, batch: Any, factor: float) -> Any:
        with torch.no_grad():
            run.scales.parameters[5].fill_(-0.1)
        return step(run, batch, factor)

    monkeypatch.setattr(training, "training_step", training_step)
    found = train(tiny, tmp_path / "run", method="original", num_tasks=1, lr=1e-9)
    state = checkpoint.read(tmp_path / "run" / "model_best.pt", "model")["model"]
    sizes = {
        name.removesuffix(".step_size"): value.item() for name, value in state.items() if name.endswith(".step_size")
    }
    low = [name for name, value in sizes.items() if value < 1e-3]
    assert len(low) == 1 and sizes[low[0]] == pytest.approx(STEP_FLOOR)
    assert [low[0] in warning for warning in found["warnings"] if "at its floor" in warning] == [True]


def test_step_sizes_change_by_a_tenth_at_most(tiny, tmp_path, monkeypatch):
    """However large the gradient; a run that needs it often says so. A floor is no trap: sizes grow from it again."""
    step, sizes = training.training_step, []

    def training_step(run: Any, batch: Any, factor: float) -> Any:
        before = [p.item() for p in run.scales.parameters]
        sums = step(run, batch, factor)
        sizes.extend(zip(before, (p.item() for p in run.scales.parameters), strict=True))
        return sums

    monkeypatch.setattr(training, "training_step", training_step)
    found = train(tiny, tmp_path / "run", method="original", num_tasks=1, step_lr=1000, num_epochs=2)
    ratios = [after / before for before, after in sizes if after > 2 * STEP_FLOOR]
    assert all(0.9 - 1e-5 < ratio < 1.1 + 1e-5 for ratio in ratios)
    assert min(ratios) < 0.901 and max(ratios) > 1.099
    assert any("was held to that" in warning for warning in found["warnings"])
    calm = train(tiny, tmp_path / "calm", method="original", num_tasks=1, lr=0.001)["warnings"]
    assert not any("step size" in warning for warning in calm)


def factors(epochs: int = 8, steps: int = 5, **settings: Any) -> list[float]:
    config = options.make(num_epochs=epochs, **settings)
    return [lr_factor(config, step, steps) for step in range(epochs * steps)]


def test_schedules():
    """At the first step, in the middle and at the end; each between 0 and 1."""
    for sched in ("cosine", "onecycle", "multistep", "constant"):
        for warmup in (0, 1):
            assert all(0 < factor <= 1 for factor in factors(sched=sched, warmup_epochs=warmup))
    cosine = factors(sched="cosine")
    assert cosine[0] == 1 and cosine[20] == pytest.approx(0.5) and cosine[-1] < 0.01
    assert cosine == sorted(cosine, reverse=True)
    one = factors(sched="onecycle", epochs=10, steps=10)
    assert one[0] == pytest.approx(0.04) and one[30] == 1 and one[65] == pytest.approx(0.5) and one[-1] < 0.01
    assert set(factors(sched="constant")) == {1}
    assert factors(sched="multistep")[::5] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert factors(lr_decay_step=3)[::5] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert factors(lr_decay_steps=[2, 7], lr_gamma=0.5)[::5] == pytest.approx([1, 1, *[0.5] * 5, 0.25])
    warm = factors(sched="constant", warmup_epochs=2)
    assert warm[:11] == pytest.approx([*(step / 10 for step in range(1, 11)), 1])


def test_nothing_of_the_run_is_global(tiny, tmp_path):
    """A run leaves torch's generator, thread count and the working folder as they were."""
    before = (torch.random.get_rng_state(), torch.get_num_threads(), Path.cwd())
    train(tiny, tmp_path / "run", method="ours", num_tasks=1)
    after = (torch.random.get_rng_state(), torch.get_num_threads(), Path.cwd())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
