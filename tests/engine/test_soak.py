# SPDX-License-Identifier: Apache-2.0
"""Mixed requests, one after the other, on models that stay: each answers as a fresh model would.

``make soak`` runs it for `VTC_SOAK_MINUTES` (10) and holds the memory of the process against what
it was early on; `VTC_SOAK_JSON` names a file for the curve.
"""

from __future__ import annotations

import functools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from leaks import resident, tensors
from torch import Tensor

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support import mini_families as mini
from vtc.benchmarks.support.calling_styles import UNSAID
from vtc.transformers_contract import cache_left, giving

FAMILIES = ("LLaVA, CLIP", "LLaVA, SigLIP", "LLaVA-NeXT", "Qwen2-VL", "InternVL")
STEPS = 3
GREEDY: dict[str, Any] = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "suppress_tokens": UNSAID,
    "output_logits": True,
    "return_dict_in_generate": True,
}
SAMPLES = 200
"""Points of the memory curve."""
GROWTH = 48 * 2**20
"""Bytes that the process may hold more in the last quarter than in the second: the allocator's
fragments. A leak of one mini cache (80 kB) in each request would be 10 times as much."""


@dataclass(frozen=True)
class Request:
    """One call, as it could come from a user."""

    how: str
    family: str
    rows: tuple[tuple[Any, ...], ...]
    pad: str
    seed: int

    @functools.cached_property
    def inputs(self) -> dict[str, Tensor]:
        rows = [list(row) for row in self.rows]
        pad = self.pad if len(rows) > 1 else None
        return mini.prompt(self.family, rows, pad, self.seed)


def forward(model: Any, request: Request) -> list[Tensor]:
    return [model(**request.inputs).logits]


def generate(model: Any, request: Request) -> list[Tensor]:
    out = model.generate(**request.inputs, **GREEDY)
    return [out.sequences, *out.logits]


def beams(model: Any, request: Request) -> list[Tensor]:
    out = model.generate(**request.inputs, **GREEDY, num_beams=2)
    return [out.sequences, *out.logits]


def second_turn(model: Any, request: Request) -> list[Tensor]:
    one = model.generate(**request.inputs, **GREEDY)
    words = torch.tensor([[7, 8, 9]]).expand(len(one.sequences), -1)
    ids = torch.cat([one.sequences, words], 1)
    mask = torch.nn.functional.pad(
        request.inputs["attention_mask"],
        (0, ids.shape[1] - request.inputs["input_ids"].shape[1]),
        value=1,
    )
    given = {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in request.inputs:
        given["mm_token_type_ids"] = (ids == mini.IMAGE).long()
    two = model.generate(**given, **giving(model, cache_left(one)), **GREEDY)
    return [two.sequences, *one.logits, *two.logits]


WAYS: dict[str, Callable[[Any, Request], list[Tensor]]] = {
    f.__name__: f for f in (forward, generate, beams, second_turn)
}


def method_of(rng: random.Random) -> vtc.Method | vtc.Chain:
    """Any method with any budget, or two of them."""

    def one() -> vtc.Method:
        name = rng.choice([m for m in sorted(vtc.methods()) if m not in ("mod", "evs", "vidcom2")])
        keep: Any = rng.choice([None, rng.randint(1, 20), Fraction(rng.randint(1, 16), 16)])
        try:
            made = seeded(name, keep, rng.randrange(4))
        except ValueError:
            made = seeded(name, None, 0)
        if rng.random() < 0.7:  # else most towers without [CLS] refuse
            made = replace(made, **made.without_cls)
        return replace(made, **made.outside_encoder) if rng.random() < 0.5 else made

    return vtc.chain(one(), one()) if rng.random() < 0.25 else one()


def request_of(rng: random.Random, family: str) -> Request:
    sizes = mini.EVERY[family].sizes
    rows = tuple(
        tuple(rng.choice(sizes) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 3))
    )
    pad = rng.choice(["left", "right"])
    how = rng.choice(list(WAYS))
    return Request(how, family, rows, "left" if how != "forward" else pad, rng.randrange(1000))


def answer(model: Any, request: Request) -> list[Tensor] | str:
    """Results of a call, or the words of a refusal."""
    try:
        return WAYS[request.how](model, request)
    except ValueError as error:  # UnsupportedError is one, a budget out of reach another
        return str(error)


def same(got: Any, want: Any, what: str) -> None:
    if isinstance(want, str) or isinstance(got, str):
        assert got == want, what
        return
    assert len(got) == len(want), what
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), f"{what}: {(a - b).abs().max()}"


def counted(model: Any) -> dict[str, Any]:
    """Contents of the report, but for the times."""
    report = model.vtc.report().to_dict()
    return {name: value for name, value in report.items() if "_ms" not in name}


class Shift:
    """Models that stay wrapped for a few requests, and what was done with them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.models = {family: mini.build(family) for family in FAMILIES}
        self.wrapped: dict[str, Any] = {}
        self.done: Counter[str] = Counter()

    @torch.no_grad()
    def serve(self) -> None:
        """One request, answered by the model that stays and by a fresh one."""
        rng, family = self.rng, self.rng.choice(FAMILIES)
        model, method = self.models[family], self.wrapped.get(family)
        if method is not None and rng.random() < 0.3:
            vtc.unwrap(model)
            method = self.wrapped.pop(family, None) and None
        if method is None and rng.random() < 0.9:
            method = method_of(rng)
            try:
                vtc.wrap(model, method)
            except ValueError:
                self.done["refused by wrap"] += 1
                assert "vtc" not in model.__dict__
                return
            self.wrapped[family] = method
        request = request_of(rng, family)
        fresh = mini.build(family)
        if method is None and rng.random() < 0.5:
            self.compress(model, fresh, request)
            return
        if method is not None:
            vtc.wrap(fresh, method)
        got, want = answer(model, request), answer(fresh, request)
        same(got, want, f"{method} {request}")
        refused = isinstance(got, str)
        self.done["refused by a call" if refused else request.how] += 1
        if method is not None and not refused:
            assert counted(model) == counted(fresh)

    def compress(self, model: Any, fresh: Any, request: Request) -> None:
        """`vtc.compress_inputs`, then the stock model."""
        method = seeded("divprune", self.rng.randint(1, 8), 0)

        def run(model: Any) -> list[Tensor]:
            out = model.generate(**vtc.compress_inputs(model, request.inputs, method), **GREEDY)
            return list(out.logits)

        same(run(model), run(fresh), f"compress_inputs {request}")
        self.done["compress_inputs"] += 1


def test_every_kind_of_request_equals_a_fresh_model() -> None:
    shift = Shift(3)
    for _ in range(15):
        shift.serve()
    assert set(WAYS) | {"compress_inputs", "refused by wrap"} <= set(shift.done)


def test_a_request_that_leaves_something_behind_is_seen() -> None:
    """The comparison has teeth: one weight of the model that stays is not what it was."""
    shift = Shift(0)
    with torch.no_grad():
        for model in shift.models.values():
            next(model.get_input_embeddings().parameters())[7] += 0.01

    def serve_all() -> None:
        for _ in range(60):
            shift.serve()

    with pytest.raises(AssertionError):
        serve_all()


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_stays_flat() -> None:
    minutes = float(os.environ.get("VTC_SOAK_MINUTES", "10"))
    shift, begin, curve = Shift(random.randrange(10**6)), time.monotonic(), []
    requests, due, step = 0, 0.0, minutes * 60 / SAMPLES
    while (now := time.monotonic() - begin) < minutes * 60:
        if now >= due:
            curve.append([round(now), requests, resident(), tensors()])
            due = now + step
        shift.serve()
        requests += 1
    early, late = (
        sorted(c[2] for c in part)[len(part) // 2]
        for part in (curve[len(curve) // 4 : len(curve) // 2], curve[-len(curve) // 4 :])
    )
    record = {
        "minutes": minutes,
        "requests": requests,
        "kinds": dict(shift.done),
        "columns": ["seconds", "requests", "resident_bytes", "tensors"],
        "curve": curve,
    }
    if path := os.environ.get("VTC_SOAK_JSON"):
        Path(path).write_text(json.dumps(record) + "\n")
    assert requests > 10 * minutes
    assert late - early < GROWTH, f"{(late - early) / 2**20:.0f} MiB more: {curve}"
