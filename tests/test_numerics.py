# SPDX-License-Identifier: Apache-2.0
"""Half precision, thread counts, processes and random seeds: which of them may change a choice.

What is exact, and what only agrees at a rate:

* Scores are computed in fp32: features in half precision and the same numbers in fp32 give the same
  choice (`test_ranking_is_fp32`), at magnitudes up to the largest fp16 number.
* The same model, inputs and thread count give the same bits, in one process and in another.
* Another thread count changes the order of sums inside matrix products. The choice stays the same
  up to near ties; logits agree to 1e-4 of their range.
* A model in half precision computes other features, so its tokens rank otherwise where they are
  close. `FLOORS` says how much of the choice is the same on the embedded model.
* The choice for a row does not depend on its batch (tests/test_random_models.py).
"""

from __future__ import annotations

import functools
import hashlib
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import mini_llava
import numpy
import pytest
import torch
from cases import few
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from random_models import BUDGETED, EXACT, Case, build, cases, inputs_of, methods_of
from test_boundary_b import features_view

import vtc
from vtc.benchmarks.budgets import seeded
from vtc.benchmarks.tasks.base import Task
from vtc.benchmarks.tiny.models import ASSETS, load_llava, llava_config
from vtc.methods.random import Random

TOGETHER = [m for m in EXACT if m != "mod"]
"""Methods that need no routers."""
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def stages(report: Any) -> dict[tuple[int, str], torch.Tensor]:
    """By image and place, (N,) bool the visual tokens there, wherever not all are: in front of the
    LLM, in its layers, their attention and their KV cache, and at the end."""
    return {
        (i, stage.label): stage.kept
        for i in range(len(report.kept))
        for stage in report.trace.stages(i)
        if not stage.label.startswith("encoder") and not stage.kept.all()
    }


def overlap(a: Any, b: Any) -> float:
    """Intersection over union of the choices of two reports, all places together."""
    one, two = stages(a), stages(b)
    empty = torch.zeros(1, dtype=torch.bool)
    both = [(one.get(k, ~empty), two.get(k, ~empty)) for k in one.keys() | two.keys()]
    return sum(int((x & y).sum()) for x, y in both) / max(1, sum(int((x | y).sum()) for x, y in both))


# ---- half precision ------------------------------------------------------------------------------

FEATURES = [m for m in BUDGETED if seeded(m, 4, 0).stages == {"features"}]


def at_magnitude(scale: float, dtype: torch.dtype, seed: int) -> Any:
    """A view whose features are numbers of ``dtype``, the largest near ``scale``."""
    view = features_view(seed=seed)
    x = view.features / view.features.abs().max() * scale
    return replace(view, features=x.to(dtype))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_ranking_is_fp32(name: str, dtype: torch.dtype) -> None:
    """The same numbers in half precision and in fp32 give the same choice."""
    method = seeded(name, Fraction(1, 3), 0)
    for scale in (6e-5, 1.0, 60000.0):
        half = at_magnitude(scale, dtype, seed=0)
        full = replace(half, features=half.features.float(), scratch={})
        a, b = (vtc.method.split_answer(method.on_features(v))[0] for v in (half, full))
        assert a is not None and b is not None
        assert torch.equal(a.group, b.group), f"features up to {scale:g}"


@functools.cache
def tiny(side: int = 12) -> tuple[Any, Any]:
    """The embedded LLaVA for images of side x side patches, and its processor."""
    from safetensors.torch import load_file
    from transformers import LlavaForConditionalGeneration

    from vtc.benchmarks.tiny.extract import resize_positions

    edge, folder = 14 * side, ASSETS / "tiny-llava"
    _, processor = load_llava()
    state = load_file(folder / "model.safetensors")
    for name in state:
        if name.endswith("position_embeddings"):
            state[name] = resize_positions(state[name], side)
    model = LlavaForConditionalGeneration.from_pretrained(
        None, config=llava_config(edge), state_dict=state, dtype=torch.float32
    )
    size = {"height": edge, "width": edge}
    processor.image_processor.size = {"shortest_edge": edge}
    processor.image_processor.crop_size = size
    return model.eval(), processor


def texture(seed: int, edge: int) -> Image.Image:
    """Noise with the 1/f spectrum of photographs: no two patches are alike."""
    g = torch.Generator().manual_seed(seed)
    f = torch.fft.fftfreq(edge)
    scale = 1 / (f[:, None].square() + f[None].square()).sqrt().clamp(min=1 / edge)
    x = torch.fft.ifft2(torch.fft.fft2(torch.randn(3, edge, edge, generator=g)) * scale).real
    x = (x - x.amin()) / (x.amax() - x.amin()) * 255
    return Image.fromarray(x.permute(1, 2, 0).to(torch.uint8).numpy())


def questions(n: int, processor: Any, textured: bool = False) -> dict[str, torch.Tensor]:
    """A batch of n drawn scenes, or textures, and one question about each."""
    items = [Task("scenes", n=200)[i] for i in range(0, 2 * n, 2)]
    edge = processor.image_processor.crop_size["height"]
    images = [texture(i, edge) if textured else item.image for i, item in enumerate(items)]
    texts = [f"<s> USER: <image>\n{item.question} ASSISTANT:" for item in items]
    return dict(processor(text=texts, images=images, return_tensors="pt", padding=True))
