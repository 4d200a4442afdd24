# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import ImageFile

sys.path.insert(0, str(Path(__file__).parent))  # the mini models and the oracle

# The mini models are so small that handing work to threads costs more than the work.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def truncated_images_are_errors(monkeypatch):
    """As Pillow has it by default; importing lmms_eval lets such images through, half grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """On older transformers, what they lack is expected to fail (tests/releases.py)."""
    from releases import expect

    expect(items)
