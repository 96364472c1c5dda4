"""Lifelong methods in a plain training loop: terms of their losses by hand, state, memory, compilation."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.small_tasks import (
    CLASSES,
    SIZE,
    batch_of,
    gradient,
    losses,
    make,
    make_task,
    move,
    network,
    play,
    steps,
    weights_of,
)

from lifequant import registry
from lifequant.data.task import Batch, user_task
from lifequant.losses import LOSSES, distillation
from lifequant.methods.importance import protected
from lifequant.qat.layers import fake_quants

METHODS = registry.names("method")
PENALISED = [name for name in METHODS if registry.method(name).has_penalty]


def softmax(phi: np.ndarray) -> np.ndarray:
    e = np.exp(phi - phi.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_lwf():
    """3 KL(former || now) at temperature 2 over the classes of task 0, on top of the task loss; nothing in task 0."""
    noise = np.random.default_rng(0)
    now, former = noise.normal(0, 2, (SIZE, CLASSES)), noise.normal(0, 2, (SIZE, CLASSES))
    method, task = make("lwf", lwf_alpha=3), make_task(1)
    batch = batch_of(task, 0)._replace(teacher=torch.tensor(former))
    method.begin_task(network(), make_task(0))
    ce = F.cross_entropy(torch.tensor(now), batch.y).item()
    assert method.task_loss(torch.tensor(now), batch).item() == ce
    method.begin_task(network(), task)
    p, q = softmax(former[:, :3] / 2), softmax(now[:, :3] / 2)
    expected = ce + 3 * (p * np.log(p / q)).sum(1).mean()
    assert method.task_loss(torch.tensor(now), batch).item() == pytest.approx(expected, rel=1e-10)
    with pytest.raises(ValueError, match="teacher"):
        method.task_loss(torch.tensor(now), batch._replace(teacher=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distillation_of_nothing(dtype):
    """No class known: exactly 0, gradient 0. All known: KL of all. One known: nothing to distil either."""
    student = torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 100
    for known in (torch.zeros(6), F.one_hot(torch.tensor(2), 6)):
        loss = distillation(student, teacher, known.bool(), 2.0)
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, student)[0], torch.zeros(4, 6, dtype=dtype))
    loss = distillation(student, teacher, torch.ones(6).bool(), 2.0)
    expected = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("stored", "counted"), [(3, [0, 2]), (6, [0, 2, 4, 5])])
def test_er_ace(stored, counted):
    """The mean over terms, in a loop: a new image among the classes of the batch's new ones, a stored one among all.

    There are six new images a class. With three stored ones a class, two of the batch's four new images are held against all
    classes as well; with six, all four are. They keep their own loss.
    """
    method, task = make("er_ace"), make_task(1)
    task.replay = torch.tensor([i for i in range(3 * stored) if i % 3 < 2])
    method.begin_task(network(), task)
    phi = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0)).double()
    y, replay = torch.tensor([3, 0, 2, 1, 3, 2]), torch.tensor([False, True, False, True, False, False])
    rows = torch.arange(6)
    terms = [(i, list(range(CLASSES))) for i in (1, 3, *counted)] + [(i, [2, 3]) for i in (0, 2, 4, 5)]
    expected = [-phi[i][classes].log_softmax(0)[classes.index(y[i])].item() for i, classes in terms]
    found = method.task_loss(phi, Batch(rows, y, replay, rows))
    assert found.item() == pytest.approx(sum(expected) / len(terms), rel=1e-12)
    assert abs(found.item() - F.cross_entropy(phi, y).item()) > 0.1


@pytest.mark.parametrize("loss", LOSSES)
def test_er_ace_with_other_losses(loss):
    """Finite, with finite gradients, in float32, whatever the batch; logits that take no part have none."""
    method, task = make("er_ace", loss=loss), make_task(1)
    method.begin_task(network(), task)
    for replay in (torch.ones(8).bool(), torch.zeros(8).bool(), torch.arange(8) < 2):
        phi = (30 * torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))).requires_grad_()
        y = torch.where(replay, torch.arange(8) % 2, 3)
        stored = replay | (torch.arange(8) < replay.sum() + (~replay).sum() / 2)  # half of the new ones count as such
        value = method.task_loss(phi, Batch(y, y, replay, y))
        (slope,) = torch.autograd.grad(value, phi)
        assert torch.isfinite(value) and torch.isfinite(slope).all()
        assert (slope[~stored][:, [0, 1, 2, 4]] == 0).all()
        assert (slope[stored][:, [0, 1, 2, 4]] != 0).any()


@pytest.mark.parametrize("name", METHODS)
def test_task_0_is_plain(name):
    """Nothing of a method enters the task loss of task 0: runs of several methods are forked from one at its end."""
    method, task = make(name, loss="ce"), make_task(0)
    method.begin_task(network(), task)
    phi = torch.randn(SIZE, CLASSES, generator=torch.Generator().manual_seed(0)).double()
    batch = batch_of(task, 0)._replace(teacher=torch.zeros_like(phi))
    assert method.task_loss(phi, batch) == F.cross_entropy(phi, batch.y)


@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.parametrize("kind", ["lsq", "float"])
def test_zero_until_weights_move(name, kind):
    model = network(kind)
    method = make(name)
    assert method.penalty(model) == 0
    method.begin_task(model, make_task(0))
    move(model)
    assert method.penalty(model) == 0
    steps(method, model, make_task(0))
    method.end_task(model, make_task(0))
    method.begin_task(model, make_task(1))
    assert method.penalty(model) == 0
    move(model)
    penalty = method.penalty(model)
    assert penalty > 0
    assert gradient(penalty, model).abs().max() > 0


@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.parametrize("kind", ["lsq", "lsq per_channel", "proxq per_channel"])
def test_steps_are_never_penalised(name, kind):
    """Neither do the quantizers' parameters have an importance, nor does the penalty change with them."""
    model = network(kind)
    method, _ = play(name, model)
    move(model)
    before = method.penalty(model)
    steps = [p for _, quant in fake_quants(model) for p in quant.parameters()]
    assert len(steps) >= 5 and (kind == "lsq" or any(p.dim() == 1 for p in steps))
    with torch.no_grad():
        for p in steps:
            p.mul_(2)
    assert torch.equal(method.penalty(model), before)
    assert len(method.importance) == sum(p.numel() for p in weights_of(model))
    assert set(protected(model)) == {name for name, _ in model.named_parameters() if "_quant." not in name}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["lsq", "float"])
def test_state(name, kind):
    """In a plain loop of two tasks: what is written in mid-task and read again goes on the same, bit for bit."""
    model = network(kind)
    method, teacher = play(name, model)
    steps(method, model, make_task(1), 3, teacher=teacher)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    again, twin = make(name), copy.deepcopy(model)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.memory_bytes() == method.memory_bytes()
    results = []
    for its, net in ((method, model), (again, twin)):
        seen = steps(its, net, make_task(1), 9, 3, teacher)
        its.end_task(net, make_task(1))
        file = io.BytesIO()
        torch.save([seen, net.state_dict(), its.state_dict()], file)
        assert np.isfinite(seen).all()
        results.append(file.getvalue())
    assert results[0] == results[1]


@pytest.mark.parametrize("name", METHODS)
def test_memory_bytes(name):
    """What is said to be kept is the tensors that are kept; class counts and rows are not worth counting."""
    method, _ = play(name, network())
    state = method.state_dict()
    kept = [value for key, value in state.items() if torch.is_tensor(value) and key not in ("counts", "known", "share")]
    kept += [state["stored"]["logits"]] if "stored" in state else []
    assert sum(method.memory_bytes().values()) == sum(value.nbytes for value in kept)
    if name in PENALISED:
        assert method.memory_bytes()["reference"] == 8 * sum(p.numel() for p in weights_of(network()))


@pytest.mark.parametrize("name", PENALISED)
def test_another_penalty(name):
    """Takes the place of the method's own, which then gathers nothing."""
    model = network()
    method, _ = play(name, model, penalty="proxq")
    move(model)
    assert method.penalty(model) == 0 and method.memory_bytes() == {}


@pytest.mark.parametrize("name", METHODS)
def test_compiles_once(name):
    """The losses are one graph, the same for both tasks."""
    torch.compiler.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model, method = network(), make(name)
    compiled = torch.compile(lambda *args: losses(method, model, *args), backend=backend, fullgraph=True)
    teacher = copy.deepcopy(model).eval()
    for place in (0, 1):
        method.begin_task(model, make_task(place))
        seen = steps(
            method,
            model,
            make_task(place),
            2,
            loss_of=lambda method, model, batch: compiled(batch, model(batch.x)),
            teacher=teacher,
        )
        method.end_task(model, make_task(place))
        assert np.isfinite(seen).all()
    assert len(graphs) == 1


def test_user_task():
    x, y, old, old_y = torch.randn(3, 2), torch.tensor([4, 2, 4]), torch.randn(2, 2), torch.tensor([0, 2])
    task = user_task(1, x, y, old, old_y, torch.tensor([0, 1, 2, 0]), num_classes=6, batch_size=2)
    assert task.classes == [2, 4] and task.buffer_count == 2 and task.counts.tolist() == [1, 0, 2, 0, 2, 0]
    assert task.old_classes.tolist() == [True, True, True, False, False, False]
    assert torch.equal(task.batch(task.replay)[0], old) and torch.equal(task.batch(task.pool)[1], torch.cat([y, old_y]))
    assert task.labels[task.past_rows].tolist() == [0, 1, 2, 0]
    first = user_task(0, x, y, num_classes=6)
    assert (
        first.pool.tolist() == [0, 1, 2]
        and not first.old_classes.any()
        and len(first.replay) == len(first.past_rows) == 0
    )
    assert user_task(1, x, y, old, old_y, num_classes=6).old_classes.tolist() == [True, False, True] + [False] * 3
