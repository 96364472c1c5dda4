"""Oscillating weights, against a loop in plain Python."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from support.small_net import small_net
from torch import Tensor, nn

from lifequant import registry
from lifequant.qat.layers import weight_layers
from lifequant.qat.oscillations import Oscillations


class Loop:
    """One weight by the definition: python numbers, a branch for each case."""

    def __init__(self, code: int, freeze: float | None) -> None:
        self.code, self.mean, self.f, self.last, self.freeze = code, float(code), 0.0, 0, freeze
        self.frozen = False

    def step(self, code: int) -> None:
        if self.frozen:
            code = self.code
        oscillated = False
        if code != self.code:
            direction = 1 if code > self.code else -1
            oscillated = self.last == -direction
            self.last = direction
        self.f = 0.99 * self.f + (0.01 if oscillated else 0.0)
        self.mean = 0.99 * self.mean + 0.01 * code
        self.code = code
        if self.freeze is not None and not self.frozen and self.f > self.freeze:
            self.frozen, self.code = True, round(self.mean)


def write_codes(model: nn.Module, codes: dict[str, Tensor]) -> None:
    """With lsq's step 0.125 a code is exact."""
    with torch.no_grad():
        for name, layer in weight_layers(model):
            layer.weight_quant.step_size.fill_(0.125)
            layer.weight.copy_(codes[name].float() * 0.125)


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight_quant.codes(layer.weight) for name, layer in weight_layers(model)}


def all_codes(model: nn.Module) -> list[int]:
    return torch.cat([codes.flatten() for codes in codes_of(model).values()]).tolist()


@pytest.mark.parametrize(
    "codes, oscillations",
    [
        ([0, 1, 0, 1], [0, 0, 1, 1]),
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([0, 1, 2, 1], [0, 0, 0, 1]),
        ([0, 1, 1, 0], [0, 0, 0, 1]),  # the pause doesn't matter
        ([0, 7, -7, -8], [0, 0, 1, 0]),
        ([0, -1, -2, 0, 1], [0, 0, 0, 1, 0]),
        ([3, 3, 3], [0, 0, 0]),
    ],
)
def test_an_oscillation_by_hand(codes, oscillations):
    """A change opposite to the last one; f <- 0.99 f + 0.01 for it."""
    model = small_net()
    watch = Oscillations()
    place = 4 * 3 * 9 + 5  # the sixth weight of conv2, behind conv1's
    base = {name: torch.zeros_like(layer.weight) for name, layer in weight_layers(model)}
    f = 0.0
    for step, (code, oscillated) in enumerate(zip(codes, oscillations, strict=True)):
        base["conv2"].view(-1)[5] = code
        write_codes(model, base)
        if step == 0:
            watch.begin_task(model)
            continue
        watch.after_step(model)
        f = 0.99 * f + 0.01 * oscillated
        assert watch.state["frequency"][place].item() == pytest.approx(f, abs=1e-7)
    others = watch.state["frequency"].clone()
    others[place] = 0
    assert others.abs().max() == 0
    assert watch.share() == pytest.approx({"conv1": 0, "conv2": (f > 0.005) / 216, "fc": 0})
    assert watch.frozen_share() == {"conv1": 0, "conv2": 0, "fc": 0}


@pytest.mark.parametrize("freeze", [None, 0.025])
def test_random_codes_against_the_loop(freeze):
    model = small_net()
    random = np.random.default_rng(0)
    codes = {n: torch.from_numpy(random.integers(-8, 8, tuple(m.weight.shape))) for n, m in weight_layers(model)}
    write_codes(model, codes)
    watch = Oscillations(freeze)
    watch.begin_task(model)
    loop = [Loop(code, freeze) for code in all_codes(model)]
    for _ in range(80):
        for value in codes.values():  # some weights never move, some often
            often = np.linspace(0, 0.5, value.numel()).reshape(tuple(value.shape))
            moves = (random.random(tuple(value.shape)) < often) * random.integers(-2, 3, tuple(value.shape))
            value.add_(torch.from_numpy(moves)).clamp_(-8, 7)
        write_codes(model, codes)
        written = all_codes(model)
        for weight, code in zip(loop, written, strict=True):
            weight.step(code)
        watch.after_step(model)
        assert all_codes(model) == [w.code if w.frozen else c for w, c in zip(loop, written, strict=True)]
    np.testing.assert_allclose(watch.state["frequency"], [w.f for w in loop], atol=1e-6)
    np.testing.assert_allclose(watch.state["mean_code"], [w.mean for w in loop], atol=1e-4)
    sizes = {name: value.numel() for name, value in codes.items()}
    for shares, of in ((watch.share(), lambda w: w.f > 0.005), (watch.frozen_share(), lambda w: w.frozen)):
        start = 0
        for name, size in sizes.items():
            assert shares[name] == pytest.approx(np.mean([of(w) for w in loop[start : start + size]]))
            start += size
    assert 0.1 < watch.share()["conv2"] < 0.9
    assert (0.1 < watch.frozen_share()["conv2"] < 0.9) == (freeze is not None)


def walk(model: nn.Module, generator: torch.Generator) -> None:
    """A step of an optimizer: 3 % of a layer's deviation to each weight; lsq's steps move as well."""
    with torch.no_grad():
        for _, layer in weight_layers(model):
            weight = layer.weight
            weight.add_(torch.randn(weight.shape, generator=generator) * (0.03 * weight.std()))
            if hasattr(layer.weight_quant, "step_size"):
                layer.weight_quant.step_size.mul_(1 + 0.002 * torch.randn((), generator=generator))


@pytest.mark.parametrize(
    "name, per_channel",
    [*((name, False) for name in registry.names("quantizer")), ("lsq", True), ("proxq", True), ("alignq", True)],
)
def test_a_frozen_code_holds(name, per_channel):
    """After every step, as the rest walks on; only frozen weights are written; weights keep their scale."""
    model = small_net(name, 2, per_channel)
    generator = torch.Generator().manual_seed(1)
    watch = Oscillations(0.012)
    watch.begin_task(model)
    scale = {n: layer.weight.std().item() for n, layer in weight_layers(model)}
    held: dict[int, int] = {}
    for _ in range(120):
        walk(model, generator)
        free = [layer.weight.clone() for _, layer in weight_layers(model)]
        watch.after_step(model)
        now = all_codes(model)
        frozen = watch.state["frozen"].nonzero().flatten().tolist()
        for place in frozen:
            held.setdefault(place, now[place])
        assert held.keys() == set(frozen)  # what is frozen stays so
        assert held == {place: now[place] for place in held}
        was, written = (
            torch.cat([w.flatten() for w in ws]) for ws in (free, [m.weight for _, m in weight_layers(model)])
        )
        assert torch.equal(was[~watch.state["frozen"]], written[~watch.state["frozen"]])
    shares = watch.frozen_share()
    assert shares["conv1"] > 0.2 and shares["fc"] > 0.1
    if name in ("proxq", "alignq", "apot", "uniform", "dorefa", "pact"):  # codes by the tensor's own statistics
        assert max(shares.values()) <= 0.5
    for n, layer in weight_layers(model):
        assert 0.5 < layer.weight.std().item() / scale[n] < 3


def test_a_frozen_code_holds_against_a_push():
    """Gradient steps that push every weight the same way by codes move all but the frozen ones."""
    model = small_net("lsq", 4)
    watch = Oscillations(0.015)
    codes = {n: torch.zeros_like(layer.weight) for n, layer in weight_layers(model)}
    write_codes(model, codes)
    watch.begin_task(model)
    for step in range(4):  # two oscillations, f = 0.0199
        codes["conv2"].view(-1)[:10] = (step + 1) % 2
        write_codes(model, codes)
        watch.after_step(model)
    assert watch.frozen_share()["conv2"] == pytest.approx(10 / 216)
    for _ in range(5):
        with torch.no_grad():
            for _, layer in weight_layers(model):
                layer.weight.add_(0.2)
        watch.after_step(model)
    now = codes_of(model)["conv2"].flatten()
    assert now[:10].tolist() == [0] * 10 and (now[10:] == 7).all()
    watch.begin_task(model)  # a new task: all may move
    assert watch.frozen_share()["conv2"] == 0 and watch.share()["conv2"] == 0
    with torch.no_grad():
        model.conv2.weight.add_(0.4)
    watch.after_step(model)
    assert (codes_of(model)["conv2"].flatten()[:10] == 3).all()


def test_not_all_of_a_projected_tensor_freezes():
    """All weights but one in ten oscillate at once: to freeze them would leave no mean and deviation."""
    model = small_net("proxq", 2)
    watch = Oscillations(0.005)
    watch.begin_task(model)
    weight = model.conv2.weight
    with torch.no_grad():
        for _ in range(6):
            weight.view(-1)[::10] *= -1
            weight.neg_()
            watch.after_step(model)
    assert watch.share()["conv2"] > 0.5
    assert watch.frozen_share()["conv2"] == 0


def test_not_all_of_a_projected_channel_freezes():
    """One channel of six oscillates whole, of another a part, which may be frozen."""
    model = small_net("proxq", 2, per_channel=True)
    watch = Oscillations(0.005)
    watch.begin_task(model)
    weight = model.conv2.weight
    with torch.no_grad():
        for _ in range(6):
            weight[0].neg_()
            weight[1].view(-1)[:9] *= -1
            watch.after_step(model)
    frozen = watch.state["frozen"][4 * 27 : 4 * 27 + 216].view(6, 36)
    assert frozen[0].sum() == 0 and 0 < frozen[1].sum() <= 18 and frozen[2:].sum() == 0


def test_a_frozen_weight_does_not_move_the_scale():
    """DoReFa's codes depend on the largest weight. One that is frozen there, and pushed at every step, stays there."""
    model = small_net("dorefa", 4)
    weight = model.conv2.weight
    with torch.no_grad():
        weight.uniform_(-0.5, 0.5)
        weight.view(-1)[0] = 1.0
    watch = Oscillations(0.005)
    watch.begin_task(model)
    watch.state["frozen"][4 * 27] = True
    watch.state["written"][4 * 27] = 1.0
    for _ in range(20):
        with torch.no_grad():
            weight.view(-1)[0] += 0.1
        watch.after_step(model)
    assert weight.view(-1)[0].item() == pytest.approx(1.0, abs=1e-4)


def test_resumed_oscillations_go_on_bit_for_bit():
    model = small_net("proxq", 2)
    generator = torch.Generator().manual_seed(1)
    watch = Oscillations(0.012)
    watch.begin_task(model)
    for _ in range(100):
        walk(model, generator)
        watch.after_step(model)
    assert watch.frozen_share()["conv2"] > 0
    file = io.BytesIO()
    torch.save(watch.state_dict(), file)
    file.seek(0)
    other_model, other = copy.deepcopy(model), Oscillations(0.012)
    other.load_state_dict(torch.load(file, weights_only=True))
    for net, w in ((model, watch), (other_model, other)):
        generator.manual_seed(2)
        for _ in range(60):
            walk(net, generator)
            w.after_step(net)
    assert all(torch.equal(v, other.state[n]) for n, v in watch.state.items())
    assert all(torch.equal(v, other_model.state_dict()[n]) for n, v in model.state_dict().items())
    assert other.share() == watch.share()


def test_a_float_network_has_no_codes():
    model = small_net(bits=32)  # the edges as well
    watch = Oscillations(0.01)
    watch.begin_task(model)
    before = model.conv2.weight.clone()
    watch.after_step(model)
    assert torch.equal(model.conv2.weight, before)
    assert watch.share() == watch.frozen_share() == {} and watch.memory_bytes() == 0


@pytest.mark.parametrize("freeze, each", [(None, 12), (0.01, 16)])
def test_bytes(freeze, each):
    watch = Oscillations(freeze)
    watch.begin_task(small_net())
    assert watch.memory_bytes() == each * (4 * 27 + 6 * 36 + 30)
