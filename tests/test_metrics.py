"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lifequant import registry
from lifequant.data.dataset import DataSet, Store
from lifequant.evaluation import metrics
from lifequant.evaluation.evaluate import evaluate
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.layers import QuantConv2d, QuantLinear

# Task 1 is best one task after it was learned; task 2 was never learned.
R = [[80.0, 10, 5], [60, 70, 5], [50, 75, 0]]
OVERLAPPING = [[80.0, 40, 0], [90, 70, 20], [70, 60, 90]]  # task 0 gains from task 1
NEVER = [[0.0, 0, 0], [0, 50, 0], [0, 40, 10]]  # task 0 was never learned


def test_averages():
    assert metrics.average_accuracy(R) == pytest.approx(125 / 3)
    assert metrics.average_accuracy_weighted(R, [10, 30, 60]) == pytest.approx((500 + 2250) / 100)
    assert metrics.average_incremental_accuracy(R) == pytest.approx((80 + 65 + 125 / 3) / 3)


def test_averages_of_a_task_never_learned():
    """Its 0 % counts in every average."""
    assert metrics.average_accuracy(NEVER) == pytest.approx(50 / 3)
    assert metrics.average_accuracy_weighted(NEVER, [50, 30, 20]) == pytest.approx(0.3 * 40 + 0.2 * 10)
    assert metrics.average_incremental_accuracy(NEVER) == pytest.approx((0 + 25 + 50 / 3) / 3)
    assert metrics.bwt(NEVER) == pytest.approx((0 + (40 - 50)) / 2)
    assert metrics.fwt(NEVER, [20.0, 5, 8]) == pytest.approx(((0 - 5) + (0 - 8)) / 2)


def test_forgetting():
    """The maximum is over t from i to T-2: not the last row, not rows before a task was learned."""
    assert metrics.forgetting(R) == pytest.approx(((80 - 50) + (70 - 75)) / 2)
    assert metrics.forgetting_rate(R) == pytest.approx((100 * 30 / 80 - 100 * 5 / 70) / 2)
    assert metrics.forgetting(OVERLAPPING) == pytest.approx(((90 - 70) + (70 - 60)) / 2)
    assert metrics.forgetting([[50.0, 99, 99], [40, 60, 99], [30, 50, 10]]) == pytest.approx((20 + 10) / 2)
    assert metrics.forgetting(NEVER) == pytest.approx((0 + 10) / 2)
    assert metrics.forgetting_rate(NEVER) == pytest.approx(20)  # task 0 has none to lose
    assert metrics.forgetting_rate([[0.0, 0], [0, 50]]) is None


def test_transfer():
    assert metrics.bwt(R) == pytest.approx(((50 - 80) + (75 - 70)) / 2)
    assert metrics.bwt(OVERLAPPING) == pytest.approx(((70 - 80) + (60 - 70)) / 2)
    assert metrics.fwt(R, [9.0, 12, 8]) == pytest.approx(((10 - 12) + (5 - 8)) / 2)


def test_undefined_is_none():
    """One task forgets nothing; joint training has one row and no sequence; before the first task there is nothing."""
    one, joint = [[70.0]], [[70.0, 50]]
    assert metrics.average_accuracy(one) == 70 and metrics.average_incremental_accuracy(one) == 70
    for metric in (metrics.forgetting, metrics.forgetting_rate, metrics.bwt):
        assert metric(one) is None and metric(joint) is None and metric([]) is None
    assert metrics.fwt(one, [10.0]) is None and metrics.fwt(joint, [10.0, 10]) is None
    assert metrics.average_accuracy(joint) == 60 and metrics.average_incremental_accuracy(joint) is None
    assert metrics.average_accuracy_weighted(one, [7]) == 70
    assert metrics.average_accuracy_weighted(joint, [30, 10]) == 65
    assert metrics.average_accuracy([]) is None and metrics.average_accuracy_weighted([], []) is None
    assert metrics.space_shift([]) == {}


def test_hits():
    logits = torch.tensor(
        [
            [9.0, 8, 7, 6, 5, 4, 3],  # right at once
            [9, 8, 7, 6, 5, 4, 3],  # 5th; right among the task's classes
            [9, 8, 7, 6, 5, 4, 3],  # 6th
            [3, 9, 8, 7, 6, 5, 4],  # 7th; right among the task's classes, where it has the largest logit
        ]
    )
    y = torch.tensor([0, 4, 5, 4])
    logits[3, 4] = 2
    classes = torch.tensor([False, False, False, False, True, True, True])
    assert metrics.hits(logits, y, classes).tolist() == [1, 2, 1]
    assert metrics.hits(logits[:, :3], torch.tensor([0, 2, 1, 1]), torch.ones(3, dtype=torch.bool)).tolist() == [
        2,
        4,
        2,
    ]


def test_space_shift():
    """RMSE of each layer between each two tasks; symmetric, 0 with itself."""
    a = [torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 2, 3, 6]), torch.tensor([2.0, 3, 4, 5])]
    shift = metrics.space_shift([{"conv": w, "fc": 2 * w} for w in a])
    np.testing.assert_allclose(shift["conv"], [[0, 1, 1], [1, 0, 1], [1, 1, 0]], atol=1e-7)
    np.testing.assert_allclose(shift["fc"], 2 * np.array(shift["conv"]), atol=1e-7)
    c = torch.tensor([4.0, 2, 3, 8])  # squares 9, 0, 0, 16 from the first
    assert metrics.space_shift([{"x": a[0]}, {"x": c}])["x"][0][1] == pytest.approx(np.sqrt(25 / 4))


class OneLayer(nn.Module):
    """A head on the mean of each channel, quantized or not."""

    def __init__(self, name: str, bits: int) -> None:
        super().__init__()
        family = registry.quantizer(name)
        self.conv = QuantConv2d(3, 3, 1, 1, 0, family.weight(bits))
        self.fc = QuantLinear(3, 4, family.weight(bits), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


def data_set(images: Tensor, labels: list[int]) -> DataSet:
    """Two tasks; test image 2 belongs to both."""
    store = Store([f"{i}.png" for i in range(len(images))], torch.tensor(labels), images)
    empty = Store(["0.png"] * 2, torch.tensor([0, 2]), images[:2])
    return DataSet("x", list("abcd"), [0, 1], empty, store, [[0], [1]], [[], []], None, [[0, 1, 2], [2, 3, 4]])


@pytest.mark.parametrize("name", registry.names("quantizer"))
def test_quantization_error_and_scores(name):
    """xi(s, t): mean squared difference of the logits with and without rounding, on task s's test images."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    labels = [0, 1, 2, 3, 2]
    model = OneLayer(name, 2)
    calibrate_network(model, torch.randn(2, 3, 4, 4))
    scores = evaluate(model, data_set(images, labels), batch_size=2)

    mean, std = np.array([[0.4914], [0.4822], [0.4465]]), np.array([[0.2470], [0.2435], [0.2616]])
    x = ((images.numpy() / 255).mean((2, 3)).T - mean) / std  # [3, 5]

    def logits(conv: Tensor, fc: Tensor) -> np.ndarray:
        weights = [w.detach().double().flatten(1).numpy() for w in (conv, fc)]
        return (weights[1] @ weights[0] @ x).T + model.fc.bias.detach().double().numpy()

    def without_rounding(layer: nn.Module) -> Tensor:
        quant = layer.weight_quant
        return quant.dequantize(quant.to_codes(layer.weight), layer.weight)

    rounded = logits(model.conv.weight_quant(model.conv.weight), model.fc.weight_quant(model.fc.weight))
    smooth = logits(without_rounding(model.conv), without_rounding(model.fc))
    if name == "lsq":  # there is no projection: without rounding it is the float network
        np.testing.assert_allclose(smooth, logits(model.conv.weight, model.fc.weight), rtol=1e-4, atol=1e-5)
    shift = ((smooth - rounded) ** 2).mean(1)
    assert scores.error == pytest.approx([shift[:3].mean(), shift[2:].mean()], rel=1e-3)
    assert min(scores.error) > 1e-4
    best = rounded.argmax(1) == labels
    assert scores.top1 == pytest.approx([100 * best[:3].mean(), 100 * best[2:].mean()])
    assert scores.top5 == [100, 100]  # of 4 classes
    assert evaluate(model, data_set(images, labels), 2, with_error=False).error == [0, 0]


def test_masked_accuracy_uses_the_classes_of_the_task():
    """Task 0 has the labels 0, 1, 2 (training and test images), task 1 has 2 and 3."""
    model = nn.Module()
    fixed = torch.tensor([3.0, 1, 2, 5])
    model.forward = lambda x: fixed.expand(len(x), 4)
    data = data_set(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), [0, 1, 2, 3, 2])
    scores = evaluate(model, data, 5, with_error=False)
    assert scores.top1 == pytest.approx([0, 100 / 3])
    assert scores.masked == pytest.approx([100 / 3, 100 / 3])  # class 0 wins in task 0, class 3 in task 1


def test_overlapping_tasks():
    """Image 2 is in both tasks' test sets and counts in both; its label is masked by each task's own classes.

    The same logits for every image: 0 has the largest, then 2, then 3, then 1. Labels 0, 1, 2 | 2, 3, 2, 3.
    """
    model = nn.Module()
    fixed = torch.tensor([4.0, 1, 3, 2])
    model.forward = lambda x: fixed.expand(len(x), 4)
    data = data_set(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), [0, 1, 2, 3, 2, 3])
    data.test_rows[1] = [2, 3, 4, 5]
    scores = evaluate(model, data, 4, with_error=False)
    assert scores.top1 == pytest.approx([100 / 3, 0])  # nothing is class 2 or 3 while 0 is among the classes
    assert scores.masked == pytest.approx([100 / 3, 50])  # image 2: not in task 0, where class 0 wins; yes in task 1
    assert metrics.average_accuracy([scores.masked]) == pytest.approx((100 / 3 + 50) / 2)
    assert metrics.average_accuracy_weighted([scores.masked], [3, 4]) == pytest.approx(100 * 3 / 7)  # 1 of 3 and 2 of 4
