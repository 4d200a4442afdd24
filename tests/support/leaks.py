# SPDX-License-Identifier: Apache-2.0
"""Counting what is left, without what was there before the test."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
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
    """Tensors that are alive; with `counting`, of this test."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def resident() -> int:
    """Bytes of this process in memory (Linux), without what the allocator only holds in reserve."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def dead(*things: weakref.ref[Any]) -> bool:
    """Whether all of them are gone."""
    gc.collect()
    return all(thing() is None for thing in things)
