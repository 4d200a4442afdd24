# SPDX-License-Identifier: Apache-2.0
"""Divergence and agreement with the stock model, against forwards made by hand."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mini_bench import MODEL, PROCESSOR, SETTINGS, Toy, bench, make_items

import vtc
from vtc.benchmarks.accuracy import answering
from vtc.benchmarks.shared import prompts
from vtc.transformers_contract import cache_left, giving

EOS = 2


@pytest.fixture(scope="module")
def sharp():
    """The mini model with a head that is surer of itself, so that divergences are large."""
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        model.lm_head.weight *= 30
    return model


@torch.no_grad()
def by_hand(model, inputs, steps: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens of one prompt and the log-probabilities of each step, in double precision."""
    out = model(**inputs, use_cache=True)
    tokens: list[int] = []
    found: list[torch.Tensor] = []
    while True:
        found.append(out.logits[0, -1].double().log_softmax(-1))
        tokens.append(int(found[-1].argmax()))
        if len(tokens) == steps or tokens[-1] == EOS:
            return tokens, found
        out = model(torch.tensor([tokens[-1:]]), **giving(model, cache_left(out)))


def expected(stock, other) -> tuple[float, int]:
    """The definition, read aloud: mean KL, and the steps that count."""
    values = []
    for a, b, log_p, log_q in zip(*stock[:1], *other[:1], *stock[1:], *other[1:]):
        values.append(float((log_p.exp() * (log_p - log_q)).sum()))
        if a != b:
            break
    return sum(values) / len(values), len(values)


def test_divergence_is_that_of_the_models_called_by_hand(sharp):
    items = make_items(3, 4)
    (batch,) = prompts.make_batches(PROCESSOR, items, len(items))
    stock = answering.answer(sharp, PROCESSOR, batch, 5, logits=True)
    with vtc.compressing(sharp, "fastv", keep_tokens=4):
        other = answering.answer(sharp, PROCESSOR, batch, 5, logits=True)
    got = answering.divergences(sharp, stock, other)
    counted = []
    for kl, item in zip(got, batch.items):
        (alone,) = prompts.make_batches(PROCESSOR, [item], 1)
        inputs = alone.inputs(sharp)
        plain = by_hand(sharp, inputs, 5)
        with vtc.compressing(sharp, "fastv", keep_tokens=4):
            compressed = by_hand(sharp, inputs, 5)
        value, steps = expected(plain, compressed)
        assert kl == pytest.approx(value, rel=1e-3, abs=1e-6)
        counted.append(steps)
    assert max(got) > 0.05
    assert len(set(counted)) > 1, "answers that part early and late"


def given(tokens: list[list[int]], logits: list[list[list[float]]]) -> answering.Answers:
    """Answers of given tokens (B, T) and logits (T, B, V)."""
    return answering.Answers([], torch.tensor(tokens), tuple(torch.tensor(x) for x in logits))


def test_steps_count_up_to_the_parting_and_up_to_the_end():
    """One answer parts at the second step (and says the same later), one ends there, one goes on.

    From the second step on, the models differ.
    """
    stock = given([[5, 6, 7, 8], [5, EOS, 0, 0], [5, 6, 7, 8]], [[[0.0, 0.0]] * 3] * 4)
    far, one = [0.0, math.log(3)], math.log(4 / 3) / 2  # KL of (1/2, 1/2) from (1/4, 3/4)
    other = given(
        [[5, 4, 7, 8], [5, EOS, 0, 0], [5, 6, 7, 8]], [[[0.0, 0.0]] * 3] + [[far] * 3] * 3
    )
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[EOS, 9]))
    got = answering.divergences(model, stock, other)
    assert got == pytest.approx([one / 2, one / 2, one * 3 / 4])
    model.generation_config.eos_token_id = None  # an answer never ends
    assert answering.divergences(model, stock, other)[1] == pytest.approx(one * 3 / 4)


def test_an_answer_that_was_shorter_is_compared_as_far_as_it_goes():
    stock = given([[5, EOS]], [[[0.0, 0.0]]] * 2)
    other = given([[EOS]], [[[0.0, 0.0]]])
    assert answering.divergences(MODEL, stock, other) == [0.0]


def test_nothing_dropped_diverges_by_nothing(tmp_path):
    """At keep_ratio=1.0, which the command line leaves out as equal to the stock model."""
    (batch,) = prompts.make_batches(PROCESSOR, make_items(2, 3), 6)
    stock = answering.answer(MODEL, PROCESSOR, batch, 3, logits=True)
    for name in ("fastv", "divprune", "pitome", "random"):
        with vtc.compressing(MODEL, name, keep_ratio=1.0):
            other = answering.answer(MODEL, PROCESSOR, batch, 3, logits=True)
        assert other.texts == stock.texts
        assert max(answering.divergences(MODEL, stock, other)) < 1e-6


def test_rows_have_the_means_of_the_lines(tmp_path):
    result = bench(tmp_path, settings=replace(SETTINGS, methods=("fastv", "random"), keep=(4,)))
    lines = [json.loads(x) for x in (tmp_path / "toy.predictions.jsonl").read_text().splitlines()]
    of: dict[str, list[dict]] = {}
    for line in lines[1:]:
        of.setdefault(line["configuration"], []).append(line)
    stock = {x["index"]: x["prediction"] for x in of["uncompressed"]}
    for row in result["rows"]:
        mine = of[row["parameters"] or row["method"]]
        assert len(mine) == len(Toy()) == result["questions"]
        assert row["kl"] == pytest.approx(sum(x["kl"] for x in mine) / len(mine))
        assert row["kl_low"] <= row["kl"] <= row["kl_high"]
        assert [x["same"] for x in mine] == [x["prediction"] == stock[x["index"]] for x in mine]
        assert row["agreement"] == pytest.approx(sum(x["same"] for x in mine) / len(mine))
    stock_kl, *others = [row["kl"] for row in result["rows"]]
    assert stock_kl == 0 < min(others)
    assert 0 < min(r["agreement"] for r in result["rows"]) < 1
    assert {x["kl"] for x in of["blank image"]} == {None}


def test_a_divergence_that_is_no_number_is_none_and_said_to_be(monkeypatch):
    """Half precision may overflow: a null in the JSON, not a number that looks like one."""
    nan = lambda model, stock, other: [float("nan")] * len(stock.texts)  # noqa: E731
    monkeypatch.setattr("vtc.benchmarks.accuracy.evaluation.divergences", nan)
    result = bench(None, settings=replace(SETTINGS, methods=("random",)))
    for row in result["rows"]:
        assert row["kl"] is row["kl_low"] is row["kl_high"] is None
        assert row["agreement"] is not None
