# SPDX-License-Identifier: Apache-2.0
"""Random models, prompts, methods and budgets: dropped == masked, counts, keeping all, unwrap."""

from __future__ import annotations

import re
from fractions import Fraction
from math import prod
from typing import Any

import torch
from cases import few
from hypothesis import event, given
from hypothesis import strategies as st
from random_models import (
    BUDGETED,
    EXACT,
    Case,
    build,
    cases,
    inputs_of,
    methods_of,
    row_of,
    units,
)
from snapshot import snapshot
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

import vtc
from vtc.benchmarks.mini_families import IMAGE
from vtc.benchmarks.oracle import compare
from vtc.decoder import sliding_window

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
CHOOSING = {"pixels", "vision", "features", "decoder"}
REFUSED = (
    r"acts after LLM layer \d+ and there are \d+: nothing would be compressed",
    r"prunes after \d layers and needs at least \d; the language model has \d",
    r"\d+ -> \d+ tokens needs a layer that keeps less than 50%",
    r"both pack the KV cache; chain only one|evict from a KV cache that \S+ has packed",
    r"both let tokens jump over layers; chain only one",
    r"reads LLM layer \d, which \S+ lets tokens jump over",
    r"reads encoder block \d \(\w+\) and this encoder has \d",
    r"crops of an image of \d+ x \d+ pixels are too many for this model",
    r"in every crop alike, and images have different numbers of crops here; give keep_ratio",
    r"\d+ -> \d+ tokens is out of reach: each of the \d blocks can merge at most half",
    r"acts in every second LLM layer and there is 1; give layers=\(0,\)",
    r"pool needs the full \d+ x \d+ grid and found \d+ tokens",
)
"""What may be refused, at wrap or in the first forward, by what the message says."""


class Say:
    """A logits processor: every row goes on with the same tokens, whatever the logits are."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        token = 7 + ids.shape[1] - self.start
        return torch.full_like(scores, -1.0).index_fill(1, torch.tensor([token]), 1.0)


def decode(model: Any, inputs: dict, style: str) -> tuple:
    """Logits of the prompt, those of decoding steps, KV length of each layer.

    The steps are those of `generate`, on given tokens; in two turns of two tokens.
    """

    def cache() -> dict[str, Any]:
        """The oracle masks what the model's own sliding cache would cut."""
        text = model.config.get_text_config()
        return {} if sliding_window(text) is None else {"past_key_values": DynamicCache()}

    def generate(inputs: dict, **how: Any) -> Any:
        return model.generate(
            **inputs,
            **how,
            max_new_tokens=2,
            do_sample=False,
            logits_processor=[Say(inputs["input_ids"].shape[1])],
            output_logits=True,
            return_dict_in_generate=True,
        )

    out = model(**inputs, use_cache=True, **cache())
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    if style == "forward":
        return out.logits, None, lengths
    one = generate(inputs, **cache())
    logits = one.logits
    if style == "two turns":
        ids = pad(one.sequences, (0, 3), value=9)
        room, more = (0, ids.shape[1] - inputs["input_ids"].shape[1]), {"input_ids": ids}
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
            if name in inputs:
                more[name] = pad(inputs[name], room, value=fill)
        logits += generate(more, past_key_values=one.past_key_values).logits
    return out.logits, torch.stack(logits, 1), lengths


def same(got: Any, want: Any) -> None:
    """Bit by bit, NaN included."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def known(error: Exception) -> bool:
    """Whether a refusal is one of those that a random case may meet."""
    event("refused")
    return any(re.search(reason, str(error)) for reason in REFUSED)


ALL = st.sampled_from((Fraction(1), 10_000))
STRATEGIES = {
    "test_dropped_is_masked": cases(EXACT),
    "test_keeping_all_is_stock": cases(BUDGETED, ALL),
    "test_a_row_alone_chooses_as_in_a_batch": cases(),
}


@few(60)
@given(STRATEGIES["test_dropped_is_masked"])
@torch.no_grad()
def test_dropped_is_masked(case: Case) -> None:
    model, inputs = build(case.model), inputs_of(case)
    stock, before = decode(model, inputs, case.style), snapshot(model)
    try:
        with vtc.compressing(model, vtc.chain(*methods_of(case))) as session:
            if any(case.prompt.images) and inputs["input_ids"].shape[1] > 1:
                check_masked(case, model, inputs, session)
            else:
                same(decode(model, inputs, case.style), stock)
    except (ValueError, vtc.UnsupportedError) as error:
        if not known(error):
            raise
    assert snapshot(model) == before
    same(decode(model, inputs, case.style), stock)


def check_masked(case: Case, model: Any, inputs: dict, session: Any) -> None:
    (got, steps, lengths), (want, want_steps, _), alive = compare(
        model, lambda: decode(model, inputs, case.style)
    )
    real, end = inputs["attention_mask"].bool(), alive[len(alive) - 1]
    torch.testing.assert_close(got[real & end], want[real & end], **CLOSE)
    if steps is not None:
        # Where the prompt ends in a token that was dropped, the last one left speaks for it.
        last = end.long().cumsum(1).argmax(1)
        first = got[torch.arange(len(got)), last]
        first = first.where((real & ~end)[:, -1:], want_steps[:, 0])
        torch.testing.assert_close(steps[:, 0], first, **CLOSE)
        torch.testing.assert_close(steps[:, 1:], want_steps[:, 1:], **CLOSE)
    jumps = any("bypass" in m.stages for m in session.methods)
    for i, length in enumerate(lengths):
        held = alive.cached[real.shape[1]][i] if alive.cached else alive[i]
        assert length <= held.sum(1).max()
        assert jumps or (held & real).sum(1).max() <= length
    model(**inputs)
    check_counts(case, end, inputs, session)


def check_counts(case: Case, end: Tensor, inputs: dict, session: Any) -> None:
    """Asked == kept == reported, in each row."""
    report, methods = session.report(), session.methods
    rows = [r for r, row in enumerate(case.prompt.images) if row]
    full = [[prod(grid) for grid in row] for row in units(case) if row]
    assert report.visual_tokens * len(rows) == sum(map(sum, full))
    assert len(report.kept) == sum(map(len, full))
    there = (end & (inputs["input_ids"] == IMAGE)).sum(1)[rows].float().mean()
    kept = sum(map(len, report.kept)) / len(rows)
    assert abs(kept + report.separators - there) < 1e-4
    if not any("bypass" in m.stages for m in methods):
        assert abs(kept - report.final_tokens) < 1e-4
    if not all(m.stages & CHOOSING and m.has_budget for m in methods):
        return
    rounded = {m.name for m in methods if m.stages <= {"pixels", "vision"}}
    if "downsample" not in rounded and not (rounded and report.layouts):
        assert abs(kept - report.asked) < 1e-4
    if len(methods) == 1 and "downsample" not in rounded:
        asked = sum(methods[0].budget(n) for row in full for n in row) / len(rows)
        assert abs(asked - report.asked) < 1e-4


@few(20)
@given(STRATEGIES["test_keeping_all_is_stock"])
@torch.no_grad()
def test_keeping_all_is_stock(case: Case) -> None:
    """A budget of all tokens, as a share or as a count that no image has; the model's own cache."""
    model, inputs = build(case.model), inputs_of(case)
    stock = decode(model, inputs, case.style)
    try:
        with vtc.compressing(model, vtc.chain(*methods_of(case))):
            got = decode(model, inputs, case.style)
    except (ValueError, vtc.UnsupportedError) as error:
        if not known(error):
            raise
        return
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[0][real], stock[0][real], **CLOSE)
    torch.testing.assert_close(got[1:], stock[1:], **CLOSE)


@few(30)
@given(STRATEGIES["test_a_row_alone_chooses_as_in_a_batch"])
@torch.no_grad()
def test_a_row_alone_chooses_as_in_a_batch(case: Case) -> None:
    """The same tokens at every stage, KV cache included, whatever mates and padding are."""
    model, inputs = build(case.model), inputs_of(case)
    try:
        with vtc.compressing(model, vtc.chain(*methods_of(case))) as session:
            model(**inputs)
            together = choices(session, case)
            alone = []
            for r, row in enumerate(case.prompt.images):
                if row:
                    model(**row_of(case, inputs, r))
                    alone += choices(session, case)
    except (ValueError, vtc.UnsupportedError) as error:
        if not known(error):
            raise
        return
    assert together == alone


def choices(session: Any, case: Case) -> list:
    """For every image, the stages and which token each of its tokens is part of there."""
    if not any(case.prompt.images):
        return []
    report = session.report()
    return [
        [(stage.label, stage.owner.tolist()) for stage in report.trace.stages(i) if stage.changed]
        for i in range(len(report.kept))
    ]
