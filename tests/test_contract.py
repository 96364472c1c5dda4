"""A faulty method: the conformance tests' message names it, its hook and the rule that it breaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import contract
from support.equal import Killed, kill_at, read, same
from support.tiny import arguments, settings, train

from lifequant import registry
from lifequant.__main__ import train as command
from lifequant.methods.base import LifelongMethod
from lifequant.training import history


class Anchor(LifelongMethod):
    """Whole: weights stay near the former task's."""

    name = "anchor"
    has_penalty = True
    defaults = LifelongMethod.defaults | {"ll_lambda": 1.0}
    anchor: torch.Tensor | None = None

    def penalty(self, model):
        now = torch.cat([p.flatten() for p in model.parameters()])
        return now.new_zeros(()) if self.anchor is None else (now - self.anchor).square().mean()

    def end_task(self, model, task):
        self.anchor = torch.cat([p.detach().flatten() for p in model.parameters()])

    def state_dict(self):
        return super().state_dict() | {"anchor": self.anchor}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.anchor = state["anchor"]

    def memory_bytes(self):
        return {"anchor": self.anchor.nbytes}


class NoNumber(Anchor):
    def task_loss(self, logits, batch):
        return super().task_loss(logits, batch) * float("nan")


class NoReturn(Anchor):
    def penalty(self, model):
        super().penalty(model)


class NoScalar(Anchor):
    def output_penalty(self, logits, batch):
        return logits.square()


class Raises(Anchor):
    def after_backward(self, model):
        raise KeyError("fc")


class NoBytes(Anchor):
    def memory_bytes(self):
        return self.anchor.nbytes


class NoData(Anchor):
    def state_dict(self):
        return super().state_dict() | {"self": self.penalty}


class Forgets(Anchor):
    def state_dict(self):
        return LifelongMethod.state_dict(self)

    def load_state_dict(self, state):
        LifelongMethod.load_state_dict(self, state)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (NoNumber, "task_loss() gives nan, which is not finite"),
        (NoReturn, "penalty() gives None where a scalar tensor is wanted: a return is missing"),
        (NoScalar, "output_penalty() gives a tensor of shape [8, 6] where a scalar tensor is wanted"),
        (Raises, "after_backward() raises KeyError ('fc')"),
        (NoBytes, "where {name: bytes} is wanted"),
        (NoData, "state_dict() gives what torch.load(weights_only=True) does not give back"),
    ],
)
def test_the_hook_is_named(fault, said, tiny, tmp_path, monkeypatch):
    registry.names("method")
    monkeypatch.setitem(registry._registered["method"], "anchor", fault)
    with pytest.raises(contract.Broken) as found, contract.blame("anchor", "lsq"):
        train(tiny, tmp_path / "run", method="anchor", checkpoint_seconds=0)
    message = str(found.value)
    assert message.startswith("method 'anchor': ") and said in message
    assert message.endswith("(docs/extending.md, 'A method')") and "\n" not in message


@pytest.mark.parametrize("method", [Anchor, Forgets])
def test_state_that_is_left_out(method, tiny, tmp_path, monkeypatch):
    """The whole method passes; the other's resumed run differs from an uninterrupted one."""
    registry.names("method")
    monkeypatch.setitem(registry._registered["method"], "anchor", method)
    argv = arguments(settings(tiny, tmp_path / "killed", method="anchor", checkpoint_seconds=0))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, history, "step_sums", 7)
        command(argv)
    with contract.blame("anchor", "lsq", resumed=True):
        command([*argv, "--resume"])
        train(tiny, tmp_path / "whole", method="anchor")

    def compare() -> None:
        same(*(read(Path(tmp_path / name)) for name in ("killed", "whole")), "results.json")

    if method is Anchor:
        contract.same_as_whole("anchor", compare)
        return
    with pytest.raises(contract.Broken, match=r"method 'anchor': a run that was killed .*: state_dict\(\) must give"):
        contract.same_as_whole("anchor", compare)
