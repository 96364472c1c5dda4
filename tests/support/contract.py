"""Whose fault it is when a conformance test fails: which method or penalty, which of its hooks, and which rule it breaks.

The rules are those of docs/extending.md.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lifequant import registry

PAGES = {
    kind: f"docs/extending.md, 'A {kind}'" for kind in ("method", "penalty", "quantizer")
}  # where the rules are said
SCALARS = ("task_loss", "penalty", "output_penalty")
HOOKS = (
    *SCALARS, "begin_task", "after_backward", "after_step", "end_task", "state_dict", "load_state_dict", "memory_bytes",
)  # fmt: skip
WHOLE = "state_dict() must give, and load_state_dict() take over, all that the hooks read"


class Broken(AssertionError):
    """A rule that a hook breaks."""


@contextmanager
def blame(method: str, quantizer: str, penalty: str | None = None, resumed: bool = False) -> Iterator[None]:
    """Inside, hooks of the method and of its penalty raise Broken where they break a rule, or raise anything else.

    ``penalty``: its name, by default the method's own choice. ``resumed``: the run goes on from a checkpoint.
    """
    penalty = penalty or registry.method(method).defaults["penalty"]
    things = [("method", method, registry.method(method))]
    things += [("penalty", penalty, registry.penalty(penalty))] if penalty != "none" else []
    with pytest.MonkeyPatch.context() as patch:
        for kind, name, thing in things:
            for hook in (hook for hook in HOOKS if hasattr(thing, hook)):
                checked = _checked(getattr(thing, hook), f"{kind} {name!r}: {hook}()", PAGES[kind], quantizer, resumed)
                patch.setattr(thing, hook, checked)
        yield


def _checked(hook: Callable, who: str, page: str, quantizer: str, resumed: bool) -> Callable:
    rule = _RULES.get(hook.__name__)

    @functools.wraps(hook)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hook.__name__ in SCALARS and not _finite(args[0]):
            raise Broken(
                f"{who}: the network's outputs or weights are not finite before it: by quantizer {quantizer!r}, or by a hook "
                f"that writes weights or gradients ({page})"
            )
        try:
            given = hook(self, *args, **kwargs)
        except Broken:
            raise
        except Exception as error:
            why = f" in a run that goes on from a checkpoint: {WHOLE}" if resumed else ""
            raise Broken(f"{who} raises {type(error).__name__} ({error}){why} ({page})") from error
        if rule and (broken := rule(given)):
            raise Broken(f"{who} gives {broken} ({page})")
        return given

    return call


def _finite(x: Any) -> bool:
    tensors = [x] if torch.is_tensor(x) else [p.detach() for p in x.parameters()]
    return all(bool(t.isfinite().all()) for t in tensors)


def _scalar(given: Any) -> str:
    wanted = "where a scalar tensor is wanted"
    if not torch.is_tensor(given):
        return f"{given!r} {wanted}{': a return is missing' if given is None else ''}"
    if given.dim():
        return f"a tensor of shape {list(given.shape)} {wanted}"
    return "" if math.isfinite(given.item()) else f"{given.item()}, which is not finite"


def _state(given: Any) -> str:
    if not isinstance(given, dict):
        return f"{given!r} where a dict is wanted"
    file = io.BytesIO()
    torch.save(given, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except Exception as error:  # torch raises errors of many types
        return f"what torch.load(weights_only=True) does not give back ({str(error).splitlines()[0][:200]})"
    return ""


def _bytes(given: Any) -> str:
    good = isinstance(given, dict) and all(isinstance(k, str) and type(n) is int and n >= 0 for k, n in given.items())
    return "" if good else f"{given!r} where {{name: bytes}} is wanted"


_RULES = dict.fromkeys(SCALARS, _scalar) | {"state_dict": _state, "memory_bytes": _bytes}


def same_as_whole(method: str, compare: Callable[[], None]) -> None:
    """``compare`` a resumed run and an uninterrupted one; what differs is the method's fault."""
    try:
        compare()
    except AssertionError as error:
        where = str(error).split("\n")[0]
        raise Broken(
            f"method {method!r}: a run that was killed and went on differs from one that was not, first in {where}: {WHOLE}, "
            f"and hooks must draw randomness from nothing but the task ({PAGES['method']})"
        ) from error
