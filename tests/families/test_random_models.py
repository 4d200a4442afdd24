# SPDX-License-Identifier: Apache-2.0
"""Random models, prompts, methods and budgets: dropped == masked, counts, keeping all, unwrap."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import Any

import pytest
import torch
from cases import few
from hypothesis import event, given
from hypothesis import strategies as st
from random_models import (
    BUDGETED,
    EXACT,
    Case,
    Geometry,
    RandomPrompt,
    build,
    cases,
    inputs_of,
    make,
    methods_of,
    row_of,
    units,
)
from snapshot import snapshot
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

import vtc
from vtc.benchmarks.support.masked_oracle import compare
from vtc.benchmarks.support.mini_families import IMAGE
from vtc.engine.refusals import sliding_window
from vtc.transformers_contract import cache_left, giving

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
    r"acts in every second LLM layer from 1 on, and the language model has 1",
    r"ends in an image token that was dropped",
    r"longer than the language model's sliding window",
    r"cannot be renumbered",
    r"takes the features of all images as one tensor, and they have different numbers",
    r"pool needs the full \d+ x \d+ grid and found \d+ tokens",
)
"""Messages of refusals that may come, at wrap or in the first forward."""


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
        return {} if sliding_window(text) is None else giving(model, DynamicCache())

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
    lengths = [layer.keys.shape[2] for layer in cache_left(out).layers]
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
        logits += generate(more, **giving(model, cache_left(one))).logits
    return out.logits, torch.stack(logits, 1), lengths


def same(got: Any, want: Any) -> None:
    """Bit by bit, NaN included."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def known(error: Exception) -> bool:
    """Whether a refusal is one of those that a random case may meet."""
    event("refused")
    return any(re.search(reason, str(error)) for reason in REFUSED)


FRONT = {"pixels", "vision", "features"}
PLAIN = Geometry("LLaVA, CLIP", 3, 1, 1, 2, 1, 4, -1, "Llama", None, "sdpa", 4.0)
ALL = st.sampled_from((Fraction(1), 10_000))
STRATEGIES = {
    "test_dropped_is_masked": cases(EXACT),
    "test_keeping_all_is_stock": cases(BUDGETED, ALL),
    "test_compressed_inputs_answer_like_the_wrapped_model": st.tuples(
        cases([m for m in BUDGETED if make(m, 4, PLAIN).stages <= FRONT]),
        st.sampled_from(("original", "compact")),
    ),
    "test_a_row_alone_chooses_as_in_a_batch": cases(),
}


@few(45)
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
        # Behind right padding a short window holds nothing but padding.
        rows = real[:, -1] if case.model.window else slice(None)
        torch.testing.assert_close(steps[rows, 0], first[rows], **CLOSE)
        torch.testing.assert_close(steps[rows, 1:], want_steps[rows, 1:], **CLOSE)
    bypassing = any("bypass" in m.stages for m in session.methods)
    for i, length in enumerate(lengths):
        held = alive.cached[real.shape[1]][i] if alive.cached else alive[i]
        assert length <= held.sum(1).max()
        assert bypassing or (held & real).sum(1).max() <= length
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
    if "downsample" in rounded or (rounded and report.layouts):  # by whole rows; crop by crop
        return
    assert abs(kept - report.asked) < 1e-4
    if len(methods) == 1:
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


@few(15)
@given(STRATEGIES["test_compressed_inputs_answer_like_the_wrapped_model"])
@torch.no_grad()
def test_compressed_inputs_answer_like_the_wrapped_model(drawn: tuple[Case, str]) -> None:
    """The stock model on short prompts, with the positions of the full ones or renumbered."""
    case, positions = drawn
    model, inputs = build(case.model), inputs_of(case)
    methods = [replace(m, positions=positions) for m in methods_of(case)]
    how = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, 4]}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    if not any(case.prompt.images):
        return
    try:
        short = vtc.compress_inputs(model, inputs, vtc.chain(*methods))
        with vtc.compressing(model, vtc.chain(*methods)):
            want = model.generate(**inputs, **how).logits
    except (ValueError, vtc.UnsupportedError) as error:
        if not known(error):
            raise
        return
    rows = inputs["attention_mask"][:, -1].bool()  # the others' next token stands behind padding
    got = model.generate(**short, **how).logits
    torch.testing.assert_close([x[rows] for x in got], [x[rows] for x in want], **CLOSE)


@few(20)
@given(STRATEGIES["test_a_row_alone_chooses_as_in_a_batch"])
@torch.no_grad()
def test_a_row_alone_chooses_as_in_a_batch(case: Case) -> None:
    """The same tokens at every stage, KV cache included, whatever mates and padding are."""
    model, inputs = build(case.model), inputs_of(case)
    if int(inputs["attention_mask"].sum(1).min()) == 1:
        return  # alone, an image of one token without text is taken for a decoded token
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


# ---- what random models found ------------------------------------------------------------------


@torch.no_grad()
def test_a_prompt_that_ends_in_a_dropped_token_was_answered_from_zeros() -> None:
    """As on the compressed prompt, the last token left is the one to go on from."""
    rows = ((3, ((1, 0),)), (1, ((1, 2), (1, 0))))
    case = Case(PLAIN, RandomPrompt(rows, "left"), (("divprune", 3),), "generate")
    model, inputs = build(case.model), inputs_of(case)
    method = replace(methods_of(case)[0], positions="compact")
    how = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    short = vtc.compress_inputs(model, inputs, method)
    want = model.generate(**short, **how).logits
    with vtc.compressing(model, method):
        got = model.generate(**inputs, **how).logits
        logits = model(**inputs).logits
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(logits[:, -1], want[0], **CLOSE)
    assert not torch.allclose(got[0][0], got[0][1])
    with pytest.raises(vtc.UnsupportedError, match=r"ends in an image token.*put text behind"):
        vtc.compress_inputs(model, inputs, methods_of(case)[0])


def test_methods_that_had_no_layer_to_act_in_did_nothing_or_said_nonsense() -> None:
    two = build(replace(PLAIN, layers=2))
    with pytest.raises(vtc.UnsupportedError, match="needs at least 3; the language model has 2"):
        vtc.wrap(two, "diprune", keep_tokens=1)
    one = build(replace(PLAIN, layers=1))
    with pytest.raises(vtc.UnsupportedError, match="from 1 on, and the language model has 1"):
        vtc.wrap(one, "mod-heuristic")


@pytest.mark.parametrize("name", ["globalcom2", "divprune", "pool", "vidcom2", "tome"])
@torch.no_grad()
def test_an_image_so_narrow_that_no_column_of_its_crops_is_left(name: str) -> None:
    """GlobalCom2 resized its thumbnail to nothing."""
    prompt = RandomPrompt(((1, (((5, 110), 1),)), (1, (((110, 4), 2),))), "left")
    case = Case(
        replace(PLAIN, family="LLaVA-NeXT", blocks=3), prompt, ((name, Fraction(1, 2)),), "generate"
    )
    model, inputs = build(case.model), inputs_of(case)
    with vtc.compressing(model, methods_of(case)[0]) as session:
        assert 0 in {
            edge for layout in run(model, inputs, session).layouts for edge in layout.canvas
        }
        check_masked(case, model, inputs, session)
        for i in range(2):
            assert session.report().stages(i)


def run(model: Any, inputs: dict, session: Any) -> Any:
    model(**inputs)
    return session.report()


@torch.no_grad()
def test_the_report_asked_for_more_than_a_chain_leaves_of_images_of_two_sizes() -> None:
    """4 of each image, then half of each: 4 of 4 x 4 and 1 of 1 x 2, not half of all 18."""
    prompt = RandomPrompt(((1, (((4, 4), 1), ((1, 2), 1))),), "left")
    chain = (("divprune", 4), ("random", Fraction(1, 2)))
    case = Case(replace(PLAIN, family="Qwen2.5-VL", heads=4, kv_heads=2), prompt, chain, "forward")
    model, inputs = build(case.model), inputs_of(case)
    with vtc.compressing(model, vtc.chain(*methods_of(case))) as session:
        report = run(model, inputs, session)
    assert report.asked == report.final_tokens == 5
