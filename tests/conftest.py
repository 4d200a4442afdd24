# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from PIL import ImageFile

sys.path.insert(0, str(Path(__file__).parent / "support"))

# The mini models are so small that handing work to threads costs more than the work.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

# Property tests try the same cases on every machine; `make soak` tries many more, new every time.
UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("vtc", derandomize=True, max_examples=60, **UNHURRIED)
examples = int(os.environ.get("VTC_SOAK_EXAMPLES", "5000"))
settings.register_profile("soak", max_examples=examples, print_blob=True, **UNHURRIED)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--soak", action="store_true", help="only the soak and property tests, long")


def pytest_configure(config: Any) -> None:
    # Whoever runs the suite in the background has it ignore Ctrl-C, which some tests press.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.load_profile("soak" if config.getoption("--soak") else "vtc")


@pytest.fixture(autouse=True)
def truncated_images_are_errors(monkeypatch):
    """As Pillow has it by default; importing lmms_eval lets such images through, half grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Soak tests run alone; on older transformers, what they lack is expected to fail."""
    from releases import expect

    def long(item: Any) -> bool:
        return bool(item.get_closest_marker("soak"))

    def of_properties(item: Any) -> bool:
        return getattr(getattr(item, "obj", None), "is_hypothesis_test", False)

    soak = config.getoption("--soak")
    chosen = [i for i in items if (long(i) or of_properties(i) if soak else not long(i))]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(chosen)])
    items[:] = chosen
    expect(items)
