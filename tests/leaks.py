# SPDX-License-Identifier: Apache-2.0
"""Counting what is left, without what was there before the test."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor


@pytest.fixture
def counting() -> Iterator[None]:
    """The collector looks at objects of this test alone: else it takes a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors() -> int:
    """Tensors that are alive, of this test."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def dead(*things: weakref.ref[Any]) -> bool:
    """Whether all of them are gone."""
    gc.collect()
    return all(thing() is None for thing in things)
