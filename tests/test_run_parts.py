"""Switches that any method takes, in a run: what they change, and what is reported of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.equal import read
from support.tiny import train

from lifequant import train as training
from lifequant.checkpointing import checkpoint
from lifequant.models.build import build
from lifequant.training.ema import MovingAverage


def test_distillation_is_from_the_former_model(tiny, tmp_path, monkeypatch):
    """In task 1 the loss has the KL divergence to the logits of the model that task 0 ended with, over its classes."""
    step, seen = training.training_step, []

    def training_step(run: Any, batch: Any, factor: float) -> Any:
        run.model.train()
        kept = {name: value.clone() for name, value in run.model.state_dict().items()}
        logits = run.model(batch.x).detach()
        run.model.load_state_dict(kept)
        sums = step(run, batch, factor)
        seen.append((run.task_index, batch, logits, sums[:-3].sum().item() / len(batch.y)))
        return sums

    monkeypatch.setattr(training, "training_step", training_step)
    flags = {"distill": 0.5, "distill_temperature": 3, "quantizer": "lsq"}
    train(tiny, tmp_path / "run", method="replay", **flags)
    former = checkpoint.read(tmp_path / "run" / "checkpoint" / "task0.pt", "run")
    teacher = build(training_config(tmp_path / "run"), 6).eval()
    teacher.load_state_dict(former["model"])
    known, seen_classes = sorted({int(c) for place, batch, *_ in seen for c in batch.y if place == 0}), 6
    for place, batch, logits, loss in seen:
        wanted = F.cross_entropy(logits, batch.y)
        if place == 1:
            old = F.softmax(teacher(batch.x).detach()[:, known] / 3, 1)
            new = F.log_softmax(logits[:, known] / 3, 1)
            wanted = wanted + 0.5 * len(known) / seen_classes * (old * (old.log() - new)).sum(1).mean()
        assert loss == pytest.approx(wanted.item(), rel=1e-4)
    assert len(seen) == 4 + 8 and len(known) == 4  # in task 1 half of each batch is stored images


def training_config(job: Any) -> Any:
    from lifequant.options import make

    return make(**{k: v for k, v in read(job)["config"].items() if k in ("method", "quantizer", "bitW")})


def test_average_is_what_is_evaluated(tiny, tmp_path, monkeypatch):
    """The model at a task's end is the moving average, and the next task starts from it."""
    ends: list[dict[str, Any]] = []

    class Recording(MovingAverage):
        def __init__(self, model: Any, decay: float) -> None:
            super().__init__(model, decay)
            self.of = model

        def update(self) -> None:
            if self.updates == 0:
                ends.append({"first": {n: v.clone() for n, v in self.of.state_dict().items()}})
            super().update()
            ends[-1]["last"] = self.averaged_state()

    monkeypatch.setattr(training, "MovingAverage", Recording)
    found = train(tiny, tmp_path / "run", method="replay", ema=0.5)
    for task, end in enumerate(ends):
        kept = checkpoint.read(tmp_path / "run" / "checkpoint" / f"task{task}.pt", "run")["model"]
        assert all(torch.equal(kept[name], value) for name, value in end["last"].items())
        assert not torch.equal(kept["conv1.weight"], end["first"]["conv1.weight"])
    assert len(ends) == 2 and found["memory_bytes"]["average"] > 4 * 270_000
    assert torch.dist(ends[1]["first"]["conv1.weight"], ends[0]["last"]["conv1.weight"]) < 0.5


def test_exemplars_are_reported_beside_the_head(tiny, tmp_path):
    found = train(tiny, tmp_path / "run", method="replay", nme=True)
    assert [len(row) for row in found["top1_nme"]] == [2, 2]
    assert found["average_accuracy_nme"] == pytest.approx(sum(found["top1_nme"][-1]) / 2)
    assert train(tiny, tmp_path / "other", method="replay")["top1_nme"] is None


def test_oscillations_are_reported(tiny, tmp_path):
    """Per layer; at a low threshold some weights are frozen; what is kept for it is counted."""
    more = {"method": "replay", "num_epochs": 3, "lr": 0.1}
    found = train(tiny, tmp_path / "run", freeze_oscillating=0.015, **more)
    assert len(found["oscillation"]) == 2
    for task in found["oscillation"]:
        assert len(task["oscillating"]) == len(task["frozen"]) == 20
        assert all(0 <= share <= 1 for part in task.values() for share in part.values())
    assert max(found["oscillation"][1]["oscillating"].values()) > 0
    assert max(found["oscillation"][1]["frozen"].values()) > 0
    assert (
        found["memory_bytes"]["oscillation"] == 12 * (270_000 // 1000) * 1000
        or found["memory_bytes"]["oscillation"] > 0
    )


def test_bits_of_layers(tiny, tmp_path):
    """Each pattern sets what it names, the rest stays; the bytes follow."""
    found = train(tiny, tmp_path / "run", method="original", num_tasks=1, layer_bits="layer3.*=2/8,fc=4")
    bits = {name: entry["bits"] for name, entry in found["max_codes_per_tensor"].items()}
    assert {bits[n] for n in bits if n.startswith("layer3") and n.endswith("weight_quant")} == {2}
    assert {bits[n] for n in bits if n.startswith("layer3") and n.endswith("act_quant")} == {8}
    assert {bits[n] for n in bits if n.startswith(("layer1", "layer2"))} == {4}
    assert (bits["fc.weight_quant"], bits["conv1.weight_quant"]) == (4, 8)
    plain = train(tiny, tmp_path / "plain", method="original", num_tasks=1)
    saved = plain["memory_bytes"]["packed_model"] - found["memory_bytes"]["packed_model"]
    weights = 64 * 32 * 9 + 5 * 64 * 64 * 9
    assert saved == weights * 2 // 8 + 6 * 64 * 4 // 8


def test_regularizers_say_what_to_look_at(tiny, tmp_path, capsys):
    train(tiny, tmp_path / "alone", method="ewc")
    assert "task-masked accuracy is where such methods differ" in capsys.readouterr().out
    train(tiny, tmp_path / "helped", method="ewc", replay_rate=0.2)
    assert "task-masked accuracy is where" not in capsys.readouterr().out
