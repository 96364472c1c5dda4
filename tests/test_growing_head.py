"""A head that grows from task to task, in a loop of one's own: what was kept of its old rows stays theirs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant import calibrate, options, quantize_model, registry
from lifequant.common.errors import UserError
from lifequant.data.task import Batch, Task, user_task
from lifequant.losses import distillation
from lifequant.methods.importance import protected
from lifequant.methods.stored_logits import StoredLogits
from lifequant.qat.scales import Scales, param_groups

METHODS = registry.names("method")
PENALTIES = [name for name in registry.names("penalty") if name != "none"]
REGULARIZERS = [name for name in METHODS if registry.method(name).regularizer and name != "lwf"]
pytestmark = pytest.mark.filterwarnings("ignore:calibrate. .* input that no quantizer gave")


def float_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def network(model: nn.Module | None = None, per_channel: bool = False) -> nn.Module:
    q = quantize_model(model or float_network(), "lsq", per_channel=per_channel)
    calibrate(q, torch.randn(8, 3, 8, 8))
    return q


def grow(q: nn.Module, classes: int, quantized: bool = False) -> None:
    """Append rows, by a new nn.Linear in place of the old, or in the quantized layer itself."""
    old, new = q[-1], nn.Linear(144, classes)
    with torch.no_grad():
        new.weight[: len(old.weight)], new.bias[: len(old.bias)] = old.weight, old.bias
    if quantized:
        old.weight, old.bias, old.out_features = new.weight, new.bias, classes
    else:
        q[-1] = new


def quantized_anew(q: nn.Module, classes: int) -> nn.Module:
    """The float model gets what ``q`` learned and a larger head, and is quantized once more."""
    model = float_network()
    model.load_state_dict({name: value for name, value in q.state_dict().items() if name in model.state_dict()})
    grow(model, classes)
    return network(model, per_channel=True)


def task_of(t: int, classes: int) -> Task:
    """New images of the last two classes; from task 1 on, two stored images of each class before."""
    drawn = torch.Generator().manual_seed(t)
    x, y = torch.randn(8, 3, 8, 8, generator=drawn), torch.arange(8) % 2 + classes - 2
    if t == 0:
        return user_task(0, x, y, num_classes=classes, batch_size=4)
    replay_y = torch.arange(classes - 2).repeat(2)
    replay_x = torch.randn(len(replay_y), 3, 8, 8, generator=drawn)
    return user_task(t, x, y, replay_x, replay_y, replay_y, num_classes=classes, batch_size=4)


def learn(q: nn.Module, method, guard, task: Task, teacher: nn.Module | None) -> None:
    callbacks = [method] if guard is method else [method, guard]
    for callback in callbacks:
        callback.begin_task(q, task)
    optimizer, scales = torch.optim.SGD(param_groups(q, 0.01), momentum=0.9), Scales(q)
    for places in torch.arange(len(task.pool)).split(4):
        rows = task.pool[places]
        x, y = task.batch(rows)
        known = None if teacher is None else teacher(x).detach()
        batch = Batch(x, y, places >= len(task.new_rows), rows, known)
        logits = q(x)
        loss = method.task_loss(logits, batch) + guard.penalty(q) + guard.output_penalty(logits, batch)
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        for callback in callbacks:
            callback.after_backward(q)
        with scales.limit_scale_updates():
            optimizer.step()
        for callback in callbacks:
            callback.after_step(q, 1.0)
    for callback in callbacks:
        callback.end_task(q, task)


@pytest.mark.parametrize("head", ["float", "quantized", "per_channel"])
@pytest.mark.parametrize("name", [*METHODS, *PENALTIES])
def test_a_loop_of_three_heads(name, head):
    """Every method and every penalty goes through 2, 4, 4 and 6 classes, its state read from a file in between."""
    settings = {"method": name} if name in METHODS else {"method": "ours", "penalty": name}
    config = options.make(**settings)
    q, teacher, kept = network(per_channel=head == "per_channel"), None, None
    for t, classes in enumerate((2, 4, 4, 6)):
        if len(q[-1].weight) < classes:
            grow(q, classes, quantized=head != "float")
        method = registry.method(config.method)(config)
        guard = registry.penalty(config.penalty)(config) if config.penalty != "none" else method
        if kept:
            method.load_state_dict(kept[0])
            guard.load_state_dict(kept[1])
        learn(q, method, guard, task_of(t, classes), teacher)
        file = io.BytesIO()
        torch.save([method.state_dict(), guard.state_dict()], file)
        file.seek(0)
        kept = torch.load(file, weights_only=True)
        teacher = copy.deepcopy(q).eval()


@pytest.mark.parametrize("head", ["float", "per_channel", "anew"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_importances_are_kept_for_old_rows(name, head):
    """Old entries have their importance and anchor, new ones importance 0: they move free, and old ones as dear as before."""
    q, method = network(per_channel=head != "float"), registry.method(name)(options.make(method=name))
    learn(q, method, method, task_of(0, 2), None)
    former = {n: p.detach().clone() for n, p in protected(q).items()}
    importance, anchor = (by_name(v, former) for v in (method.importance, method.anchor))
    assert importance["4.weight"].any()
    same = method.importance
    method.begin_task(q, task_of(0, 2))
    assert method.importance is same  # nothing is allocated anew while nothing grows
    if head == "anew":
        q = quantized_anew(q, 5)
    else:
        grow(q, 5, quantized=head == "per_channel")
    with pytest.raises(UserError, match="grow before begin_task"):
        method.penalty(q)
    method.begin_task(q, task_of(1, 5))
    now = {n: p.detach().clone() for n, p in protected(q).items()}
    for n, values in by_name(method.importance, now).items():
        old = tuple(slice(size) for size in former[n].shape)
        assert torch.equal(values[old], importance[n]) and values.sum() == importance[n].sum()
    for n, values in by_name(method.anchor, now).items():
        old = tuple(slice(size) for size in former[n].shape)
        expected = now[n].clone()
        expected[old] = anchor[n]
        assert torch.equal(values, expected)
    at_anchor = method.penalty(q).item()
    with torch.no_grad():
        q[-1].weight[2:] += 1
        assert method.penalty(q).item() == at_anchor
        q[-1].weight[:2] += 1
    moved = former["4.weight"] + 1 - anchor["4.weight"]
    expected = (importance["4.weight"] * moved.square()).sum() + at_anchor
    expected -= (importance["4.weight"] * (former["4.weight"] - anchor["4.weight"]).square()).sum()
    assert method.penalty(q).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_new_head_beside_the_old():
    """Importances go by the parameters' names: those of a second head are 0, wherever it stands."""
    q, method = network(), registry.method("ewc")(options.make(method="ewc"))
    learn(q, method, method, task_of(0, 2), None)
    old = by_name(method.importance, dict(protected(q)))
    q[0].second = nn.Linear(144, 2)  # its parameters stand before those of the old head
    method.begin_task(q, task_of(1, 4))
    now = by_name(method.importance, dict(protected(q)))
    assert list(now)[:3] == ["0.weight", "0.bias", "0.second.weight"] and len(now) == len(old) + 2
    for name, values in now.items():
        assert torch.equal(values, old.get(name, torch.zeros_like(values)))


def by_name(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view_as(p).clone() for (name, p), part in zip(like.items(), parts, strict=True)}


def test_a_head_that_lost_outputs_is_refused():
    q, method = network(), registry.method("ewc")(options.make(method="ewc"))
    learn(q, method, method, task_of(0, 2), None)
    q[-1] = nn.Linear(144, 1)
    with pytest.raises(UserError, match=r"4.weight had the shape \[2, 144\] in the former task and now has \[1, 144\]"):
        method.begin_task(q, task_of(1, 2))


def test_published_penalty_leaves_new_rows_free():
    q, config = network(), options.make(method="ours", penalty="proxq_published")
    method, guard = registry.method("ours")(config), registry.penalty("proxq_published")(config)
    learn(q, method, guard, task_of(0, 2), None)
    grow(q, 4)
    guard.begin_task(q, task_of(1, 4))
    assert guard.importance["4.weight"].shape == (4, 144)
    assert guard.importance["4.weight"][:2].any() and not guard.importance["4.weight"][2:].any()
    assert torch.equal(guard.anchor["4.weight"], q[-1].weight)


def test_a_teacher_of_fewer_classes():
    """Distillation over the classes that the teacher has, as if the others were not there."""
    phi, teacher = torch.randn(3, 5), torch.randn(3, 2)
    known = torch.tensor([True, True, False, False, False])
    expected = F.kl_div(F.log_softmax(phi[:, :2] / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean")
    torch.testing.assert_close(distillation(phi, teacher, known, 2.0), expected)


def test_stored_logits_of_fewer_classes():
    """An image's logits count over the classes that the head had when they were stored, and are kept when classes come."""
    images, labels, none = torch.randn(9, 3, 8, 8), torch.arange(9) % 6, torch.tensor([], dtype=torch.int64)
    q, stored = network(), StoredLogits()
    stored.update(q, Task(0, [0, 1], images, labels % 2, torch.arange(3), none, none, 2, 4), recompute=False)
    former = q.eval()(images).detach().half()
    grow(q, 4, quantized=True)
    rows = torch.arange(3, 6), torch.tensor([0, 1])
    stored.update(q, Task(1, [2, 3], images, labels % 4, *rows, torch.arange(3), 4, 4), recompute=False)
    assert torch.equal(stored.table[[0, 1], :2], former[:2])
    grow(q, 6, quantized=True)
    wider = q(images).detach().half()
    rows = torch.arange(6, 9), torch.tensor([0, 3])
    task = Task(2, [4, 5], images, labels, *rows, torch.arange(6), 6, 4)
    stored.update(q, task, recompute=False)
    phi, batch_rows = torch.randn(3, 6), torch.tensor([0, 3, 6])
    batch = Batch(images[batch_rows], labels[batch_rows], torch.tensor([True, True, False]), batch_rows)
    expected = (phi[0, :2] - former[0]).square().sum() + (phi[1, :4] - wider[3, :4]).square().sum()
    torch.testing.assert_close(stored.distance(phi, batch), expected / 2)
    again = StoredLogits()
    again.load_state_dict(stored.state_dict())
    assert torch.equal(again.distance(phi, batch), stored.distance(phi, batch)) and again.known == 6
