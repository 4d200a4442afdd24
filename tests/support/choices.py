# SPDX-License-Identifier: Apache-2.0
"""Choices of methods, in a form that runs can be compared by, in one process or in two.

python tests/support/choices.py    prints the digest of all methods
"""

from __future__ import annotations

import hashlib
from typing import Any

import mini_llava
import torch
from random_models import EXACT

import vtc
from vtc.benchmarks.shared.budgets import seeded

TOGETHER = [m for m in EXACT if m != "mod"]
"""Methods that need no routers."""


def choice_and_logits(model: Any, inputs: dict) -> tuple[list, torch.Tensor]:
    """Of a wrapped model: for each image where its tokens went at each stage, and the logits."""
    logits = model(**inputs).logits
    if "pixel_values" not in inputs or inputs["input_ids"].shape[1] == 1:
        return [], logits
    report = model.vtc.report()
    every = [report.trace.stages(i) for i in range(len(report.kept))]
    return [[stage.owner.tolist() for stage in image] for image in every], logits


def digest() -> str:
    """Of choices and logits of every method on a mini LLaVA, bit by bit, on one thread."""
    seen, inputs = hashlib.sha256(), mini_llava.prompt([1, 2], pad="left")
    model = mini_llava.build()
    with torch.no_grad():
        for name in TOGETHER:
            with vtc.compressing(model, seeded(name, None, 0)):
                choice, logits = choice_and_logits(model, inputs)
            seen.update(f"{name} {choice} {logits.tolist()}".encode())
    return seen.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(digest())
