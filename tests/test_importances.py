"""What EWC, SI, MAS, RWalk and SCP hold weights by: loops over single images, closed forms, the algorithm in numpy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.small_tasks import CLASSES, gradient, make, make_task, move, network, play, steps, weights_of
from torch import Tensor, nn

from lifequant.data.task import Batch, Task, user_task
from lifequant.methods.base import LifelongMethod
from lifequant.methods.importance import flat


def by_loop(
    model: nn.Module, task: Task, rows: Tensor, measure: Callable[[Tensor, Tensor, nn.Module], Tensor]
) -> Tensor:
    model = copy.deepcopy(model).eval()
    x, y = task.batch(rows)
    return torch.stack([measure(model(x[i : i + 1]), y[i : i + 1], model) for i in range(len(rows))]).mean(0)


def squared(logits: Tensor, y: Tensor, model: nn.Module) -> Tensor:
    return gradient(-logits.log_softmax(1)[0, y[0]], model) ** 2


@pytest.mark.parametrize("kind", ["lsq", "proxq", "float"])
def test_fisher(kind):
    """Each image's squared gradient through the quantizers, in eval mode; evenly spaced images; the mode is given back."""
    model, task = network(kind), make_task()
    model[1].eval() if kind == "float" else model.bn1.eval()
    modes = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for flags, rows in (({}, torch.arange(20)), ({"ewc_images": 5}, torch.arange(0, 20, 4))):
        method = make("ewc", **flags)
        method.begin_task(model, task)
        method.end_task(model, task)
        expected = by_loop(model, task, rows, squared) / 2
        assert expected.max() > 0
        torch.testing.assert_close(method.importance, expected, rtol=1e-9, atol=1e-14)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def after_tasks(name: str, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> tuple[LifelongMethod, nn.Module, list]:
    """Three tasks with given F, in which some weights do not matter; (method, model now, [(F, weights)])."""
    model, task, generator = network("float"), make_task(), torch.Generator().manual_seed(3)
    method, past = make(name, **flags), []
    monkeypatch.setattr(f"lifequant.methods.{name}.fisher", lambda *args: past[-1][0])
    for _ in range(3):
        method.begin_task(model, task)
        move(model, 0.3)
        weights = flat(model.parameters()).detach().clone()
        importance = torch.rand(len(weights), generator=generator).double()
        past.append((importance * (torch.rand(len(weights), generator=generator) < 0.6), weights))
        method.end_task(model, task)
    move(model, 0.5)
    return method, model, past


def test_ewc_is_the_sum_over_tasks(monkeypatch):
    method, model, past = after_tasks("ewc", monkeypatch)
    w = flat(model.parameters())
    expected = sum((f * (w - anchor) ** 2).sum() / 2 for f, anchor in past)
    found = method.penalty(model)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient(found, model), gradient(expected, model), rtol=1e-9, atol=1e-12)


def test_online_ewc(monkeypatch):
    method, model, past = after_tasks("online_ewc", monkeypatch, online_ewc_gamma=0.5)
    w, (f0, _), (f1, _), (f2, anchor) = flat(model.parameters()), *past
    expected = ((f0 / 4 + f1 / 2 + f2) * (w - anchor) ** 2).sum() / 2
    assert method.penalty(model).item() == pytest.approx(expected.item(), rel=1e-12)


def test_mas():
    model, task = network(), make_task()
    method = make("mas")
    method.begin_task(model, task)
    method.end_task(model, task)
    first = by_loop(model, task, task.new_rows, lambda f, y, net: gradient((f * f).sum(), net).abs())
    torch.testing.assert_close(method.importance, first, rtol=1e-9, atol=1e-14)
    method.end_task(model, task)
    torch.testing.assert_close(method.importance, 2 * first)


def test_si_is_the_loss_that_was_lost():
    """Gradient flow on a quadratic sum a_i w_i^2 / 2: weight i brings about a_i (w_i(0)^2 - w_i(1)^2) / 2 of the fall."""
    model, task = nn.Linear(3, 1, bias=False).double(), make_task()
    a, start = torch.tensor([1.0, 2, 5]).double(), torch.tensor([2.0, -1, 0.5]).double()
    model.weight.data.copy_(start[None])
    method = make("si", si_xi=0.1)
    method.begin_task(model, task)
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-4)
    for _ in range(1000):
        optimizer.zero_grad()
        (a * model.weight[0] ** 2 / 2).sum().backward()
        method.after_backward(model)
        optimizer.step()
        method.after_step(model, 1.0)
    end = model.weight.detach()[0]
    lost = a * (start**2 - end**2) / 2
    assert lost.min() > 0.1
    torch.testing.assert_close(method.path, lost, rtol=3e-3, atol=0)
    method.end_task(model, task)
    torch.testing.assert_close(method.importance, lost / ((end - start) ** 2 + 0.1), rtol=3e-3, atol=0)


@pytest.mark.parametrize("name", ["si", "rwalk"])
def test_path_excludes_the_penalty(name):
    """The recorded gradient is that of the task loss alone, in a loop whose backward takes both."""
    model = network()
    method, _ = play(name, model, ll_lambda=30.0)
    recorded, alone, both, change = [], [], [], []

    def loss_of(method: LifelongMethod, model: nn.Module, batch: Batch) -> Tensor:
        task_loss = method.task_loss(model(batch.x), batch)
        all_of_it = task_loss + 30.0 * method.penalty(model)
        alone.append(gradient(task_loss, model))
        both.append(gradient(all_of_it, model))
        return all_of_it

    for step in range(3):
        before = flat(weights_of(model)).detach()
        steps(method, model, make_task(1), 1, step, loss_of=loss_of)
        recorded.append(method.before_step[0])
        change.append(flat(weights_of(model)).detach() - before)
    for found, expected in zip(recorded, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    assert (both[2] - alone[2]).abs().max() > 1e-4
    path = -sum(g * d for g, d in zip(alone, change, strict=True))
    torch.testing.assert_close(method.path, path, rtol=1e-7, atol=1e-12)


def test_si_counts_no_negative_importance():
    model = network("float")
    method, _ = play("si", model)
    former = method.importance.clone()
    method.path.fill_(-1.0)
    method.end_task(model, make_task(1))
    assert torch.equal(method.importance, former) and former.max() > 0 and former.min() >= 0


def test_rwalk():
    """The whole algorithm in numpy on a softmax regression, two tasks; g = X^T (p - y) / N."""
    decay, every, epsilon, rate, strength = 0.7, 2, 1e-3, 0.5, 0.2
    noise = np.random.default_rng(0)
    w = noise.normal(0, 1, (3, 4))
    model = nn.Linear(4, 3, bias=False).double()
    model.weight.data.copy_(torch.tensor(w))
    flags = {"rwalk_decay": decay, "rwalk_every": every, "rwalk_epsilon": epsilon, "ll_lambda": strength}
    method = make("rwalk", **flags)
    fisher, score, importance, anchor = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4)), w
    for place in range(2):
        x, y = noise.normal(0, 1, (5, 6, 4)), noise.integers(0, 3, (5, 6))
        method.begin_task(model, task := user_task(place, torch.tensor(x[0]), torch.tensor(y[0]), num_classes=3))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        gained, fall, velocity, origin = np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4)), w
        for step in range(5):
            sign = 1 if step < 2 else -1  # uphill at last, so that some scores are negative
            optimizer.param_groups[0]["lr"] = sign * rate
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.tensor(x[step])), torch.tensor(y[step]))
            (loss + strength * method.penalty(model)).backward()
            method.after_backward(model)
            optimizer.step()
            method.after_step(model, 1.0)

            e = np.exp(x[step] @ w.T)
            p = e / e.sum(1, keepdims=True)
            g = (p - np.eye(3)[y[step]]).T @ x[step] / 6
            velocity = 0.9 * velocity + g + strength * 2 * importance * (w - anchor)
            new = w - sign * rate * velocity
            fisher = decay * fisher + (1 - decay) * g**2
            fall, w = fall - g * (new - w), new
            if step in (1, 3, 4):  # the task's end closes a segment, too
                gained, fall, origin = gained + fall / (fisher * (w - origin) ** 2 / 2 + epsilon), 0, w
        method.end_task(model, task)
        np.testing.assert_allclose(model.weight.detach(), w, rtol=1e-10)
        score = gained if place == 0 else (score + gained) / 2
        importance = fisher / fisher.max() + np.maximum(score, 0) / np.maximum(score, 0).max()
        anchor = w
        np.testing.assert_allclose(method.fisher.view(3, 4), fisher, rtol=1e-9)
        np.testing.assert_allclose(method.importance.view(3, 4), importance, rtol=1e-8)
        assert (score < 0).any()


def test_scp_of_a_linear_model():
    """m = W x_mean + b, so exactly x_mean_j^2 / K for W and 1 / K for b; slices come near, and have their own formula."""
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double() + 0.5
    task = user_task(0, x, torch.zeros(30).long(), num_classes=3, batch_size=7)
    model = nn.Linear(4, 3).double()
    mean = torch.cat([x.mean(0).repeat(3), torch.ones(3)])
    exact = mean**2 / 3
    for slices in (0, 1, 800):
        method = make("scp", scp_slices=slices)
        method.begin_task(model, task)
        method.end_task(model, task)
        xi = method.directions(task).double()
        if slices == 0:
            torch.testing.assert_close(method.importance, exact)
        else:
            torch.testing.assert_close(xi.norm(dim=1), torch.ones(slices).double())
            squares = xi.square().mean(0)
            expected = torch.cat([squares.repeat_interleave(4), squares]) * mean**2
            torch.testing.assert_close(method.importance, expected, rtol=1e-6, atol=0)
            assert torch.allclose(method.importance, exact, rtol=0.12) == (slices == 800)
    again = make("scp", scp_slices=800)
    assert torch.equal(again.directions(task).double(), xi)
    assert not torch.equal(again.directions(make_task(1))[0].double(), xi[0, :1])


def test_scp_of_a_network():
    """The mean output of all images first, over batches of 8, 8 and 4; then gradients, squared, over K."""
    model, task = network(), make_task()
    method = make("scp")
    method.begin_task(model, task)
    method.end_task(model, task)
    net = copy.deepcopy(model).eval()
    mean = net(task.batch(task.new_rows)[0]).mean(0)
    expected = sum(gradient(m, net) ** 2 for m in mean) / CLASSES
    torch.testing.assert_close(method.importance, expected, rtol=1e-9, atol=1e-14)
