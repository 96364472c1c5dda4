"""Names to classes. A file in methods/, quantizers/ or models/ registers what it holds; nothing else needs to know it.

>>> from lifequant import registry
>>> registry.quantizer("proxq").weight(4)  # doctest: +ELLIPSIS
ProxQWeight(...)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from lifequant.errors import UserError, closest

_PACKAGES = {"quantizer": "lifequant.quantizers", "method": "lifequant.methods", "model": "lifequant.models"}
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
    """All registered names of a kind ("quantizer", "method" or "model"), sorted."""
    if kind not in _loaded:
        package = importlib.import_module(_PACKAGES[kind])
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{_PACKAGES[kind]}.{module.name}")
        _loaded.add(kind)
    return sorted(_registered[kind])


def _find(kind: str, name: str) -> Any:
    known = names(kind)
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}{closest(name, known)} (known: {', '.join(known)})")
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


def model(name: str) -> Any:
    """The model's builder: ``builder(num_classes, scheme, shortcut="A") -> nn.Module``."""
    return _find("model", name)
