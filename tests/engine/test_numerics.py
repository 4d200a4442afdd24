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
* The choice for a row does not depend on its batch (tests/families/test_random_models.py).
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
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
from choices import TOGETHER, choice_and_logits, digest
from hypothesis import given
from hypothesis import strategies as st
from naive_two_places import features_view
from PIL import Image
from random_models import BUDGETED, EXACT, Case, build, cases, inputs_of, methods_of

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.tasks.registry import Task
from vtc.benchmarks.tiny.models import ASSETS, llava_config, load_llava
from vtc.methods.random import Random

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


KEEP, SLACK = Fraction(1, 3), 0.15
FLOORS: dict[str, tuple[float, float]] = {
    "cdpruner": (0.75, 0.80),
    "dart": (0.80, 0.93),
    "diprune": (0.90, 0.93),
    "divprune": (0.65, 0.80),
    "downsample": (1.00, 1.00),
    "fastervlm": (0.90, 0.95),
    "fastv": (0.90, 0.95),
    "globalcom2": (0.90, 0.95),
    "holov": (0.90, 0.93),
    "mob": (0.65, 0.85),
    "mod-heuristic": (0.90, 0.95),
    "mustdrop": (0.90, 0.95),
    "pitome": (0.35, 0.40),
    "pool": (1.00, 1.00),
    "prefixkv": (0.95, 0.98),
    "prumerge": (0.88, 0.95),
    "pyramiddrop": (0.90, 0.95),
    "random": (1.00, 1.00),
    "sparsevlm": (0.88, 0.94),
    "todre": (0.88, 0.95),
    "tokencorr": (0.90, 0.93),
    "tome": (0.35, 0.75),
    "tops": (0.60, 0.85),
    "transprune": (0.90, 0.95),
    "uniform": (1.00, 1.00),
    "vidcom2": (0.90, 0.95),
    "visionzip": (0.80, 0.93),
    "vispruner": (0.48, 0.60),
    "vscan": (0.90, 0.95),
    "zero-tprune": (0.78, 0.90),
    "zipvl": (0.88, 0.95),
}
"""Least overlap (intersection over union) of the choices in bf16 and in fp16 with that in fp32, a
third of 144 tokens kept; chance is 0.2. Means over 8 scenes, and over 8 textures.

Methods that rank once are at 0.9 and above. Greedy ones (DivPrune, CDPruner, MoB, TOPS), those that
remove duplicates in rounds (VisPruner) or take every n-th of what is left (VisionZip) build each
pick on the ones before: a near tie that falls the other way changes all that follow. In ToMe and
PiToMe that goes on through twelve blocks. They are not undecided, noise of 1e-5 on the pixels
changes nothing in fp32; noise of 1e-4 leaves PiToMe 0.65, and bf16 rounds to 4e-3.
"""


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
    return sum(int((x & y).sum()) for x, y in both) / max(
        1, sum(int((x | y).sum()) for x, y in both)
    )


# ---- half precision ------------------------------------------------------------------------------

FEATURES = [m for m in BUDGETED if seeded(m, 4, 0).stages == {"features"}]


def at_magnitude(scale: float, dtype: torch.dtype, seed: int) -> Any:
    """A view whose features are numbers of ``dtype``, the largest near ``scale``."""
    view = features_view(seed=seed)
    x = view.features / view.features.abs().max() * scale
    return replace(view, features=x.to(dtype), projector=lambda x: x)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_ranking_is_fp32(name: str, dtype: torch.dtype) -> None:
    """The same numbers in half precision and in fp32 give the same choice."""
    method = seeded(name, Fraction(1, 3), 0)
    for seed, scale in itertools.product(range(3), (6e-5, 1.0, 60000.0)):
        half = at_magnitude(scale, dtype, seed)
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


@functools.cache
def in_every_dtype(n: int, textured: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The small embedded model by dtype, and a batch for it."""
    model, processor = tiny()
    models = {name: copy.deepcopy(model).to(dtype) for name, dtype in HALVES.items()}
    return {"fp32": model, **models}, questions(n, processor, textured)


def agreement(name: str, half: str, n: int, textured: bool) -> float:
    """Overlap of the choices in half precision and in fp32, a third of the tokens kept."""
    models, inputs = in_every_dtype(n, textured)
    method = seeded(name, KEEP, 0) if name != "mod-heuristic" else seeded(name, None, 0)
    reports = []
    for model in (models["fp32"], models[half]):
        given = {k: x.to(model.dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        with vtc.compressing(model, method) as session, torch.no_grad():
            model(**given)
            reports.append(session.report())
    return overlap(*reports)


def test_the_table_has_all_methods() -> None:
    assert sorted(FLOORS) == sorted(TOGETHER), (
        "give a new method its floors; `pytest --soak -s -k half_precision` prints its overlaps"
    )


@pytest.mark.parametrize("name", FLOORS)
def test_bf16_chooses_what_fp32_chooses(name: str) -> None:
    assert agreement(name, "bf16", 2, textured=True) >= FLOORS[name][0] - SLACK


@pytest.mark.soak
@pytest.mark.parametrize("textured", [False, True], ids=["scenes", "textures"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", FLOORS)
def test_half_precision_chooses_what_fp32_chooses(name: str, half: str, textured: bool) -> None:
    got = agreement(name, half, 8, textured)
    print(f"{name:16s} {half} {'textures' if textured else 'scenes'} {got:.3f}")
    assert got >= FLOORS[name][list(HALVES).index(half)]


# ---- the same again ------------------------------------------------------------------------------


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@few(3)
@given(cases(EXACT, longest=2))
@torch.no_grad()
def test_runs_repeat_bit_by_bit_and_threads_change_no_choice(case: Case) -> None:
    """Random models: their sums are so short that threads change next to nothing in them."""
    model, inputs = build(case.model), inputs_of(case)
    try:
        vtc.wrap(model, vtc.chain(*methods_of(case)))
        first, logits = choice_and_logits(model, inputs)
    except (ValueError, vtc.UnsupportedError):
        return  # tests/families/test_random_models.py looks at refusals
    torch.manual_seed(7)
    torch.rand(3)
    again, same = choice_and_logits(model, inputs)
    assert first == again and torch.equal(logits, same)
    for n in (2, 4):
        with threads(n):
            other, close = choice_and_logits(model, inputs)
        assert first == other
        torch.testing.assert_close(close, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("name", TOGETHER)
@torch.no_grad()
def test_threads_agree_on_the_embedded_model(name: str) -> None:
    """144 patches of textures: 98 % of the choice at least, and 90 % of merges; logits within 1 %
    of their range where the choice is the same."""
    models, inputs = in_every_dtype(8, True)
    model, method = models["fp32"], seeded(name, None if name == "mod-heuristic" else KEEP, 0)
    with vtc.compressing(model, method) as session:
        want = model(**inputs).logits
        report = session.report()
        for n in (2, 4):
            with threads(n):
                got = model(**inputs).logits
            rate = overlap(report, session.report())
            print(f"{name:16s} {n} threads {rate:.4f}")
            assert rate >= (0.90 if method.merges else 0.98)
            if rate == 1.0:
                assert (got - want).abs().max() <= 0.01 * want.abs().max()


@pytest.mark.soak
def test_another_process_gives_the_same_bits() -> None:
    here = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "17", "PYTHONPATH": str(here.parent)}
    script = [sys.executable, str(here / "support" / "choices.py")]
    out = subprocess.run(script, env=environment, capture_output=True, check=True)
    assert out.stdout.decode().split()[-1] == digest()


# ---- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOGETHER)
@torch.no_grad()
def test_global_random_state_is_neither_read_nor_moved(name: str) -> None:
    model, inputs = mini_llava.build(), mini_llava.prompt([1, 2], pad="left")
    vtc.wrap(model, seeded(name, Fraction(1, 2), 0) if name != "mod-heuristic" else name)
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        numpy.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
        seen.append(choice_and_logits(model, inputs))
        after = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1])


@given(st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 2**40))
def test_random_is_its_seed(n: int, one: int, two: int) -> None:
    """The same seed, the same subset; a smaller budget keeps a part of it; others differ."""
    view = replace(features_view(batch=1), features=torch.zeros(1, n, 2), total=n)

    def kept(seed: int, k: int) -> set[int]:
        reduction = Random(seed=seed, keep_tokens=k).on_features(view)
        return set(range(n)) if reduction is None else set(reduction.keep[0].tolist())

    half = max(1, n // 2)
    assert kept(one, half) == kept(one, half)
    assert kept(one, max(1, half // 2)) <= kept(one, half) and len(kept(one, half)) == half
    if n >= 64 and one % 2**32 != two % 2**32:
        assert kept(one, half) != kept(two, half)


def test_random_keeps_every_place_equally_often() -> None:
    """Over 2,000 seeds each of 60 places is kept half of the time, within 5 deviations."""
    view = replace(features_view(batch=1), features=torch.zeros(1, 60, 2), total=60)
    counts = torch.zeros(60)
    for seed in range(2000):
        counts[Random(seed=seed, keep_tokens=30).on_features(view).keep[0]] += 1  # type: ignore[union-attr]
    assert (counts - 1000).abs().max() < 5 * (2000 * 0.25) ** 0.5
