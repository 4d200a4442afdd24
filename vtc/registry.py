# SPDX-License-Identifier: Apache-2.0
"""The registry: methods by name, and chains of them."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from .method import Chain, Method


def chain(*methods: str | Method) -> Chain:
    """Combine methods of different stages: ``vtc.chain(PiToMe(keep_ratio=0.5), FastV())``."""
    if not methods:
        raise ValueError("chain needs at least one method")
    return Chain(tuple(resolve(m)[0] for m in methods))


_REGISTRY: dict[str, Callable[..., Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method available under its ``name``."""
    if not cls.name:
        raise ValueError(f"{cls.__name__} needs a name")
    if cls.name in _REGISTRY:
        raise ValueError(f'a method called "{cls.name}" is already registered')
    _REGISTRY[cls.name] = cls
    return cls


def known_methods() -> dict[str, type[Method]]:
    """All registered methods by name."""
    package = importlib.import_module(f"{__package__}.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))  # type: ignore[arg-type]


def resolve(method: str | Method | Chain, **kwargs: Any) -> tuple[Method, ...]:
    """A name, a method or a chain as a tuple of methods.

    Raises:
        ValueError: unknown name (the message gives the nearest ones), or hyper-parameters beside a
            method that already has them.
    """
    if isinstance(method, str):
        known = known_methods()
        if method not in known:
            near = difflib.get_close_matches(
                method.lower().replace("_", "-"), known, n=3, cutoff=0.4
            )
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f'unknown method "{method}"; {hint}')
        try:
            return (known[method](**kwargs),)
        except TypeError as error:
            names = ", ".join(f.name for f in fields(known[method]))
            raise ValueError(f"{method}: {error}; its parameters are {names}") from None
    if kwargs:
        raise ValueError(f"{method} already has its parameters; give {', '.join(kwargs)} to it")
    if isinstance(method, Chain):
        return method.methods
    if isinstance(method, Method):
        return (method,)
    raise ValueError(f"expected a method name, a Method or vtc.chain(...), got {method!r}")
