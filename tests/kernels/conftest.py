# SPDX-License-Identifier: Apache-2.0
"""Triton runs interpreted where TRITON_INTERPRET=1 was set before its import, else on a GPU.

Without either, ``interpreted/`` is not collected here: `test_interpreter.py` runs it in processes
of its own, so that nothing else in the suite imports an interpreted Triton.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
collect_ignore = [] if INTERPRETED or torch.cuda.is_available() else ["interpreted"]


@pytest.fixture
def poisoned():
    """torch.empty is filled with NaN (integers: their maximum): every element must be written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def device():
    return "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
