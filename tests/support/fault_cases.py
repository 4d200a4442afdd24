# SPDX-License-Identifier: Apache-2.0
"""Answers and reports of a model, and their comparison, for tests of faults."""

from __future__ import annotations

from typing import Any

import torch
from style_cases import METHODS as STYLES
from style_cases import generated
from torch import Tensor

import vtc

METHODS: dict[str, Any] = {**STYLES, "zipvl": vtc.methods()["zipvl"](keep_ratio=0.5)}
"""One of each stage and mechanism: those of test_styles.py, and one with a bypass."""


def facts(model: Any) -> dict[str, Any]:
    """The report without times."""
    report = model.vtc.report().to_dict()
    return {name: value for name, value in report.items() if not name.endswith("_ms")}


def answers(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits of a prompt and of two tokens behind it."""
    return list(generated(model, inputs, max_new_tokens=3))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
