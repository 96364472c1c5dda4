"""DER++ and ProxQ's functional form: terms by hand, and which logits are stored when."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.small_tasks import CLASSES, SIZE, batch_of, make, make_task, move, network

from lifequant import registry
from lifequant.data.task import Batch, Task, user_task


def test_derpp():
    """Mean loss of the pool + 0.5 * the replay images' mean squared difference from the logits at the former task's end."""
    model, task = network(), make_task(1)
    method = make("derpp", derpp_alpha=0.5)
    method.begin_task(model, make_task(0))
    assert method.memory_bytes() == {"logits": 0}
    method.begin_task(model, task)
    assert model.training and method.memory_bytes() == {"logits": 6 * CLASSES * 2}
    x, _ = task.batch(torch.arange(40))
    former = copy.deepcopy(model).eval()(x).detach().half().double()
    batch = batch_of(task, 0)
    assert 1 < batch.is_replay.sum() < 7
    phi = torch.randn(SIZE, CLASSES, generator=torch.Generator().manual_seed(0)).double()
    squares = [((phi[i] - former[row]) ** 2).mean().item() for i, row in enumerate(batch.rows) if batch.is_replay[i]]
    label = F.cross_entropy(phi, batch.y).item()
    assert method.task_loss(phi, batch).item() == pytest.approx(label + 0.5 * np.mean(squares), rel=1e-12)
    none = batch._replace(is_replay=torch.zeros(SIZE).bool())
    assert method.task_loss(phi, none).item() == label

    move(model, 0.2)  # in task 2: image 3 is let go, 4 is new again, 20 is newly stored
    later = make_task(2)
    later = Task(2, [2, 3], later.images, later.labels, torch.tensor([4, 33, 34]), torch.tensor([0, 1, 20]),
                 torch.arange(32), CLASSES, SIZE, 4)  # fmt: skip
    method.begin_task(model, later)
    now = copy.deepcopy(model).eval()(x).detach().half().double()
    assert method.stored.held.nonzero()[:, 0].tolist() == [0, 1, 4, 20]
    assert torch.equal(method.stored.table[[0, 1, 4]].double(), former[[0, 1, 4]])
    assert torch.equal(method.stored.table[20].double(), now[20]) and not torch.equal(now[0], former[0])


def test_derpp_where_rows_do_not_last():
    """In tasks of tensors a row is another image in each task: all logits are computed anew."""
    model, method = network("float"), make("derpp", derpp_alpha=0.5)
    x, y = torch.randn(9, 3, 8, 8).double(), torch.arange(9) % CLASSES
    method.begin_task(model, user_task(0, x[:4], y[:4], num_classes=CLASSES))
    method.begin_task(model, user_task(1, x[4:8], y[4:8], x[:2], y[:2], num_classes=CLASSES))
    method.begin_task(model, user_task(2, x[4:8], y[4:8], x[2:4], y[2:4], num_classes=CLASSES))
    expected = copy.deepcopy(model).eval()(x[2:4]).half()
    assert torch.equal(method.stored.table[4:], expected) and method.stored.held.tolist() == [False] * 4 + [True] * 2


def test_proxq_function():
    """Mean over the batch's replay images of the squared distance from the former task's logits, over the classes it knew.

    Zero without replay images; all former logits are taken anew as a task begins; written and read it is the same.
    """
    model, task = network(), make_task(1)
    guard = registry.penalty("proxq_function")(SimpleNamespace(ll_lambda=1.0))
    guard.begin_task(model, make_task(0))
    guard.begin_task(model, task)
    assert guard.has_penalty and guard.penalty(model) == 0 and model.training
    phi = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    rows = torch.tensor([30, 1, 25, 6, 1, 31])
    batch = Batch(rows, rows, rows < 20, rows)
    for _ in range(2):
        former = copy.deepcopy(model).eval()(task.batch(rows)[0]).detach().half().double()
        expected = np.mean([((phi[i] - former[i])[:3] ** 2).sum().item() / 3 for i in (1, 3, 4)])
        assert guard.output_penalty(phi, batch).item() == pytest.approx(expected, rel=1e-12)
        assert guard.output_penalty(phi, batch._replace(is_replay=rows < 0)) == 0
        again = registry.penalty("proxq_function")(guard.config)
        again.load_state_dict(guard.state_dict())
        assert again.output_penalty(phi, batch) == guard.output_penalty(phi, batch)
        assert again.memory_bytes() == guard.memory_bytes() == {"logits": 6 * 5 * 2}
        move(model, 0.1)
        guard.begin_task(model, task)
    first = registry.penalty("proxq_function")(guard.config)
    first.begin_task(model, make_task(0))
    assert first.output_penalty(phi, batch) == 0 and first.memory_bytes() == {"logits": 0}
    warnings: list[str] = []
    task.replay, task.warn = task.replay[:0], warnings.append
    guard.begin_task(model, task)
    assert guard.output_penalty(phi, batch) == 0 and "no replay image" in warnings[0]
