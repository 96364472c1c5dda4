"""Names to classes. A file in methods/, penalties/, quantizers/ or models/ registers what it holds; nothing else needs to
know it.

Other packages add theirs by entry points in the groups lifequant.methods, lifequant.penalties, lifequant.quantizers and
lifequant.models.

>>> from lifequant import registry
>>> registry.quantizer("proxq").weight(4)  # doctest: +ELLIPSIS
ProxQWeight(...)
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lifequant import presets
from lifequant.common.errors import UserError, closest
from lifequant.common.text import wrapped

_PACKAGES = {
    "method": "lifequant.methods",
    "penalty": "lifequant.penalties",
    "quantizer": "lifequant.quantizers",
    "model": "lifequant.models",
}
ALIASES = {"method": {"lifequant": "ours", "finetune": "original"}}  # other names, for what a user types
_registered: dict[str, dict[str, Any]] = {kind: {} for kind in _PACKAGES}
_loaded: set[str] = set()


def register(kind: str, name: str) -> Callable[[Any], Any]:
    """Decorator: ``@register("quantizer", "lsq")`` above a class or, for a model, above its builder."""

    def add(thing: Any) -> Any:
        thing.name = name
        _registered[kind][name] = thing
        return thing

    return add


def names(kind: str) -> list[str]:
    """All registered names of a kind ("method", "penalty", "quantizer" or "model"), sorted."""
    if kind not in _loaded:
        package = importlib.import_module(_PACKAGES[kind])
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{_PACKAGES[kind]}.{module.name}")
        _loaded.add(kind)
        for point in entry_points(group=_PACKAGES[kind]):
            _add(kind, point)
    return sorted(_registered[kind])


def _add(kind: str, point: Any) -> None:
    """Register what another package offers. Raises UserError where it can't be had, or takes a name that is there."""
    where = f"entry point {point.name!r} of {point.dist.name if point.dist else 'a package'} ({_PACKAGES[kind]})"
    former = _registered[kind].get(canonical(kind, point.name))
    try:
        thing = point.load()
    except Exception as error:  # another's import may raise anything
        raise UserError(f"{where}: {point.value} can't be loaded ({error}): mend or uninstall that package") from error
    if former not in (None, thing):
        raise UserError(f"{where}: there is a {kind} of that name already: rename or uninstall it")
    register(kind, point.name)(thing)


def canonical(kind: str, name: str) -> str:
    """The registered name that ``name`` is an alias of, else ``name`` itself."""
    return ALIASES.get(kind, {}).get(name, name)


def unknown(kind: str, name: str, others: Iterable[str] = ()) -> UserError:
    """The error for a name that is not registered; ``others`` may be meant too."""
    known = names(kind)
    near = closest(name, [*known, *ALIASES.get(kind, {}), *others], most=3 if kind == "model" else 1)
    more = ", and torchvision's classification models: lifequant list" if kind == "model" else ""
    return UserError(f"unknown {kind} {name!r}{near} (known: {', '.join(known)}{more})")


def _find(kind: str, name: str) -> Any:
    name = canonical(kind, name)
    if name not in names(kind):
        raise unknown(kind, name)
    return _registered[kind][name]


def quantizer(name: str, **options: Any) -> Any:
    """A Quantizer of that name; options are its own (``quantizer("proxq", c=3.0)``)."""
    return _find("quantizer", name)(**options)


def quantizer_class(name: str) -> Any:
    """The Quantizer's class, for its flags."""
    return _find("quantizer", name)


def method(name: str) -> Any:
    """The LifelongMethod's class."""
    return _find("method", name)


def penalty(name: str) -> Any:
    """The Penalty's class."""
    return _find("penalty", name)


def own_flags(kind: str, name: str) -> dict[str, argparse.Action]:
    """{destination: its argparse action} of the flags that a method, penalty or quantizer adds."""
    parser = argparse.ArgumentParser(add_help=False)
    _find(kind, name).add_args(parser)
    return {action.dest: action for action in parser._actions}


def describe() -> str:
    """Methods, quantizers, models and presets: the name, what it is, its source, its aliases; at most 80 columns."""
    parts = []
    for kind in _PACKAGES:
        found = {name: _find(kind, name) for name in names(kind)}
        parts.append(
            (
                _PACKAGES[kind].removeprefix("lifequant."),
                {n: (getattr(x, "help", None) or _first_line(x)) + _aliases(kind, n) for n, x in found.items()},
            )
        )
    import torchvision  # which takes a second

    of_torchvision = wrapped(", ".join(torchvision.models.list_models(module=torchvision.models)), indent=2)
    parts.append(("presets", {name: presets.load(name)["help"] for name in presets.names()}))
    lists = [
        f"{title}:\n" + "\n".join(_entry(name, line) for name, line in sorted(lines.items())) for title, lines in parts
    ]
    lists.append(
        "recipes (lifequant sweep NAME):\n" + "\n".join(_entry(n, _title(p)) for n, p in presets.recipes().items())
    )
    return "\n\n".join([*lists, f"torchvision:\n  {of_torchvision}"])


def _aliases(kind: str, name: str) -> str:
    return "".join(f"; also called {alias}" for alias, meant in ALIASES.get(kind, {}).items() if meant == name)


def _title(recipe: Path) -> str:
    return next(line for line in recipe.read_text(encoding="utf-8").split("\n") if line.startswith("title")).split('"')[
        1
    ]


def _entry(name: str, text: str) -> str:
    return wrapped(f"{name:<18} {text}", indent=19)


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]


def model(name: str) -> Any:
    """The model's builder: ``builder(num_classes, scheme, shortcut="A") -> nn.Module``."""
    return _find("model", name)
