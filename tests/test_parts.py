"""Averaged weights, nearest mean of exemplars and the balanced head, against loops and sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.small_net import SmallNet, small_net
from torch import Tensor, nn

from lifequant import registry
from lifequant.data.dataset import DataSet, Store
from lifequant.data.task import Task
from lifequant.evaluation.nearest_mean import class_means, features, nme_accuracy, nme_hits, nme_predict
from lifequant.qat.batchnorm import reestimate_bn
from lifequant.qat.layers import QuantLinear
from lifequant.training.head import balanced_order, train_head

# Nearest mean of exemplars


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nearest(f: np.ndarray, means: dict[int, np.ndarray]) -> list[int]:
    """By the distance to each class's mean, class after class."""
    return [min(means, key=lambda c: np.linalg.norm(row - means[c])) for row in unit(f)]


def test_nearest_mean_against_numpy():
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 7)) * random.uniform(0.1, 30, size=(60, 1))  # lengths must not matter
    labels = random.choice([0, 1, 3, 5], size=60)  # 2 and 4 have no exemplar
    means = class_means(torch.from_numpy(x).float(), torch.from_numpy(labels), 6)
    expected = {c: unit(unit(x[labels == c]).mean(0)) for c in (0, 1, 3, 5)}
    assert means.shape == (6, 7) and means.isfinite().all()
    for c, mean in expected.items():
        np.testing.assert_allclose(means[c], mean, atol=1e-6)
    present = torch.tensor([True, True, False, True, False, True])
    test = random.normal(size=(200, 7)) * random.uniform(0.1, 30, size=(200, 1))
    test[0] = -sum(expected.values())  # far from all: nearer to an absent class's 0
    found = nme_predict(torch.from_numpy(test).float(), means, present)
    assert found.tolist() == nearest(test, expected)
    assert len(set(found.tolist())) == 4
    lengths = {0: 0.2, 1: 0.6, 3: 1.0, 5: 1.8}  # the nearest, not the one of the least angle
    scaled = means * torch.tensor([lengths.get(c, 0) for c in range(6)])[:, None]
    expected = {c: length * expected[c] for c, length in lengths.items()}
    assert nme_predict(torch.from_numpy(test).float(), scaled, present).tolist() == nearest(test, expected)
    y = torch.from_numpy(random.integers(0, 6, 200))
    assert nme_hits(torch.from_numpy(test).float(), y, means, present).tolist() == (found == y).tolist()


class Counting(nn.Module):
    """Features are the channels' means, so known by hand; the head is wrong about everything. Counts its images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)  # not the head
        self.first.weight.data = torch.eye(3).flip(0)
        nn.init.zeros_(self.first.bias)
        self.drop = nn.Dropout(0.5)
        family = registry.quantizer("lsq")
        self.fc = QuantLinear(3, 4, family.weight(2), family.activation(2))
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.fc(self.drop(self.first(x.mean((2, 3)))))


def data_set() -> DataSet:
    """Two tasks; test image 4 is in both. Classes 0, 1, 2 have exemplars of their own color; test images less so."""
    random = torch.Generator().manual_seed(3)
    colors = torch.tensor([[220, 40, 40], [40, 220, 40], [40, 40, 220], [220, 220, 40]])

    def images(labels: Tensor, noise: int) -> Tensor:
        plain = colors[labels][:, :, None, None].expand(-1, -1, 4, 4)
        shift = torch.randint(-noise, noise + 1, (len(labels), 3, 1, 1), generator=random)
        return (plain + shift).clamp(0, 255).to(torch.uint8)

    y, z = torch.arange(12) % 4, torch.tensor([0, 1, 2, 3, 0, 1, 2, 2, 1])
    train = Store([f"{i}.png" for i in range(12)], y, images(y, 20))
    test = Store([f"t{i}.png" for i in range(9)], z, images(z, 160))
    return DataSet(
        "x", list("abcd"), [0, 1], train, test, [[0], [1]], [[], []], None, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    )


def color(images: Tensor) -> np.ndarray:
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    return (images.double().numpy().mean((2, 3)) / 255 - mean) / std


def test_accuracy_by_exemplars():
    data, model = data_set(), Counting()
    model.train()
    rows = [0, 1, 2, 4, 5, 6]  # no exemplar of class 3
    found = nme_accuracy(model, data, rows, batch_size=4)
    f, labels = color(data.train.images[rows]), data.train.labels[rows].numpy()
    means = {c: unit(unit(f[labels == c]).mean(0)) for c in (0, 1, 2)}
    right = np.array(nearest(color(data.test.images), means)) == data.test.labels.numpy()
    assert found == pytest.approx([100 * right[[0, 1, 2, 3, 4]].mean(), 100 * right[[4, 5, 6, 7, 8]].mean()])
    assert min(found) > 0 and max(found) < 100 and found[0] != found[1]
    assert model.images == len(rows) + 9  # image 4 once
    assert nme_accuracy(model, data, torch.tensor(rows), batch_size=100) == found
    assert model.training and model.drop.training
    assert not model.fc._forward_pre_hooks
    with pytest.raises(ValueError, match="no exemplar"):
        nme_accuracy(model, data, [], 4)


def test_features_are_what_the_head_takes():
    """Not quantized, not normalized, in eval mode, batch after batch."""
    model, x = Counting(), torch.randn(5, 3, 4, 4)
    found = features(model, [x[:3], x[3:]])
    np.testing.assert_allclose(found, x.mean((2, 3)).flip(1), atol=1e-6)
    assert not found.requires_grad
    with pytest.raises(ValueError, match="no linear layer"):
        features(nn.Conv2d(3, 3, 1), [x])


# The balanced head


def task(images: int = 60) -> Task:
    """Five classes of five colors; class 0 has most images."""
    labels = torch.tensor([0] * (images - 16) + [1, 2, 3, 4] * 4)
    random = torch.Generator().manual_seed(0)
    colors = torch.tensor([[230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20], [20, 230, 230]])
    noise = torch.randint(-15, 16, (images, 3, 8, 8), generator=random)
    x = (colors[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    every, none = torch.arange(images), torch.arange(0)
    return Task(0, [0, 1, 2, 3, 4], x, labels, every[:50], every[50:], none, 5, 16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def biased_net() -> SmallNet:
    """Class 0 wins everywhere. The head's codes reach far enough for logits that tell: its step is not trained."""
    model = small_net()
    job = task()
    reestimate_bn(model, [job.batch(job.pool)[0]])
    with torch.no_grad():
        model.fc.weight_quant.step_size.fill_(0.05)
        model.fc.bias.copy_(torch.tensor([10.0, 0, 0, 0, 0]))
    return model


def by_class(model: nn.Module, job: Task) -> list[float]:
    model.eval()
    x, y = job.batch(job.pool)
    right = (model(x).argmax(1) == y).double()
    return [right[y == c].mean().item() for c in range(5)]


def test_a_biased_head_is_mended_and_nothing_else_changes():
    model, job = biased_net(), task()
    assert by_class(model, job) == [1, 0, 0, 0, 0]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_head(model, job, 25, 16, 0.3, generator(0))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert model.training and model.bn1.training
    assert all(p.grad is None for p in model.parameters()) and all(p.requires_grad for p in model.parameters())
    assert min(by_class(model, job)) >= 0.75


def test_the_head_is_a_function_of_the_generator():
    def trained(seed: int) -> Tensor:
        model = biased_net()
        torch.seed()  # another one: no global randomness
        train_head(model, task(), 2, 16, 0.1, generator(seed))
        return torch.cat([model.fc.weight.flatten(), model.fc.bias]).detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_two_steps_of_the_head_by_hand():
    """SGD with momentum on the softmax's gradient, through the head's codes, at the learning rates 0.2 and 0.1."""
    model, job = small_net(), task()
    fc = model.fc
    with torch.no_grad():
        fc.weight_quant.step_size.mul_(0.5)  # some weights are clipped: they have no gradient
    inputs = features(model, [job.batch(job.pool)[0]])
    x = (fc.act_quant.codes(inputs) * fc.act_quant.scale()).double().numpy()
    s = fc.weight_quant.scale().item()
    w, b = (p.detach().double().numpy() for p in (fc.weight, fc.bias))
    vw = vb = 0
    draws, y = generator(5), job.labels.numpy()
    for lr in (0.2, 0.2 * (1 + np.cos(np.pi / 2)) / 2):
        order = balanced_order(job.labels[job.pool], draws).numpy()
        logits = x[order] @ (np.clip(np.round(w / s), -128, 127) * s).T + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p = (p / p.sum(1, keepdims=True) - np.eye(5)[y[order]]) / len(order)
        vw = 0.9 * vw + (p.T @ x[order]) * ((w / s >= -128) & (w / s <= 127))
        vb = 0.9 * vb + p.sum(0)
        w, b = w - lr * vw, b - lr * vb
    clipped = (fc.weight.abs() > 128 * s).sum().item()
    assert 0 < clipped < 30
    train_head(model, job, 2, len(job.pool), 0.2, generator(5))
    np.testing.assert_allclose(fc.weight.detach(), w, atol=1e-5)
    np.testing.assert_allclose(fc.bias.detach(), b, atol=1e-5)


def test_draws_are_balanced():
    """Each class a third whatever it has, each of its images alike; labels may have gaps."""
    labels = torch.tensor([0] * 9000 + [3] * 900 + [7] * 100)
    order = balanced_order(labels, generator(0))
    assert len(order) == 10000
    drawn = np.bincount(labels[order].numpy(), minlength=8) / 10000
    np.testing.assert_allclose(drawn[[0, 3, 7]], 1 / 3, atol=0.02)  # 4 standard deviations
    rare = np.bincount(order[order >= 9900].numpy() - 9900, minlength=100)
    assert rare.min() > 10 and rare.max() < 65  # 33 +- 6
    assert not torch.equal(order, balanced_order(labels, generator(1)))
