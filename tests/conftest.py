# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # the mini models and the oracle

# The mini models are so small that handing work to threads costs more than the work.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """On older transformers, what they lack is expected to fail (tests/releases.py)."""
    from releases import expect

    expect(items)
