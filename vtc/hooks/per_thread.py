# SPDX-License-Identifier: Apache-2.0
"""State of a forward that is going on: each thread has its own, so threads can share a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Values:
    """Attributes of one object in one thread; torch.compile follows them better than a dict."""


class _Local(threading.local):
    """Other values in every thread. A copy of it has none."""

    def __init__(self) -> None:  # called again in every thread
        self.values = _Values()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Local, ()


class Threaded:
    """Base of a class with `PerThread` attributes."""

    local: _Local

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self.local = _Local()
        return self


class PerThread(Generic[T]):
    """An attribute that has a value of its own in every thread, at first what ``make`` gives."""

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Threaded, owner: type) -> T:
        values = instance.local.values
        if not hasattr(values, self.name):
            setattr(values, self.name, self.make())
        return getattr(values, self.name)

    def __set__(self, instance: Threaded, value: T) -> None:
        setattr(instance.local.values, self.name, value)
