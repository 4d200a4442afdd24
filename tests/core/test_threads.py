# SPDX-License-Identifier: Apache-2.0
"""Several threads on one wrapped model, and on several that share weights or configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread
from typing import Any

import mini as encoders
import mini_llava as mini
import pytest
import torch
from fault_cases import METHODS, answers, equal, facts
from leaks import counting, tensors
from transformers import LlavaForConditionalGeneration

import vtc
from vtc.benchmarks.support import mini_families

__all__ = ["counting"]  # a fixture

PROMPTS = [
    mini.prompt([1, 2], pad="left", seed=1),
    mini.prompt(1, batch=3, seed=2, before=9),
    mini.prompt([2, 1], pad="left", seed=3),
]
"""Shapes that differ: a mix-up is an error or another answer."""


def at_once(jobs: list[Callable[[], Any]], times: int) -> list[list[Any]]:
    """Results of each job each time, all running in threads of their own."""
    start = Barrier(len(jobs))

    def work(job: Callable[[], Any]) -> list[Any]:
        out = []
        with torch.no_grad():
            for _ in range(times):
                start.wait(120)
                try:
                    out.append(job())
                except BaseException:
                    start.abort()  # the others need not wait
                    raise
        return out

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(work, job) for job in jobs]]


def together(model: Any, prompts: list[dict], times: int) -> None:
    """Prompts in threads of their own give, bit by bit, what they give one after the other."""
    want = [(answers(model, inputs), facts(model)) for inputs in prompts]
    jobs = [lambda inputs=inputs: (answers(model, inputs), facts(model)) for inputs in prompts]
    for got, expected in zip(at_once(jobs, times), want, strict=True):
        for logits, report in got:
            assert equal(logits, expected[0])
            assert report == expected[1]  # that of the thread's own call


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_one_model(name: str) -> None:
    together(vtc.wrap(mini.build(), METHODS[name]), PROMPTS[:2], 3)


@pytest.mark.soak
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_one_model_for_long(name: str) -> None:
    together(vtc.wrap(mini.build(), METHODS[name]), PROMPTS, 300)


@pytest.mark.soak
@pytest.mark.parametrize("family", sorted(mini_families.EVERY))
@pytest.mark.parametrize("name", ["divprune", "fastv", "prefixkv"])
@torch.no_grad()
def test_one_model_of_every_family(family: str, name: str) -> None:
    one, two, three = mini_families.EVERY[family].sizes
    rows = [[[one], [two, three]], [[three, one]]]
    prompts = [mini_families.prompt(family, r, "left", seed=i) for i, r in enumerate(rows)]
    model = vtc.wrap(mini_families.build(family), name, keep_ratio=0.5)
    together(model, prompts, 20)


@pytest.mark.parametrize("family", ["LLaVA-NeXT", "Qwen2.5-VL"])
@torch.no_grad()
def test_models_with_images_of_any_size(family: str) -> None:
    one, two, three = mini_families.EVERY[family].sizes
    prompts = [
        mini_families.prompt(family, [[one], [two, three]], "left", seed=0),
        mini_families.prompt(family, [[three, one]], seed=1),
    ]
    together(vtc.wrap(mini_families.build(family), "divprune", keep_ratio=0.5), prompts, 3)


@pytest.mark.parametrize("name", ["hf-clip", "hf-blip", "hf-blip2"])
@torch.no_grad()
def test_one_encoder(name: str) -> None:
    """BLIP's keys get the sizes of merged tokens by two side doors of their own."""
    made = encoders.ENCODERS[name]
    model = vtc.wrap(made(), "tome", keep_ratio=0.5, proportional_attention=True)
    pixels = [encoders.images(2, seed=1), encoders.images(3, seed=2)]
    want = [list(made.run(model, x).values()) for x in pixels]
    jobs = [lambda x=x: list(made.run(model, x).values()) for x in pixels]
    for got, expected in zip(at_once(jobs, 10), want, strict=True):
        assert all(equal(x, expected) for x in got)


def pair(how: str) -> tuple[Any, Any]:
    """Two models that share their configuration, or each parameter."""
    one = mini.build()
    if how == "weights":
        shared = {id(p): p for p in (*one.parameters(), *one.buffers())}
        return one, copy.deepcopy(one, shared)
    two = LlavaForConditionalGeneration(one.config).eval()
    two.load_state_dict(one.state_dict())
    return one, two


@pytest.mark.parametrize("how", ["weights", "configuration"])
@torch.no_grad()
def test_models_that_share(how: str) -> None:
    """Wrapped and unwrapped in any order, one by one or at once, neither notices the other."""
    (one, two), inputs = pair(how), PROMPTS[0]
    stock = answers(one, inputs)
    before = one.model.language_model.config._attn_implementation
    chosen = [METHODS["fastv"], METHODS["chain"]]
    want = []
    for model, method in zip((one, two), chosen, strict=True):
        with vtc.compressing(model, method):
            want.append(answers(model, inputs))
    vtc.wrap(one, chosen[0])
    assert equal(answers(two, inputs), stock)
    vtc.wrap(two, chosen[1])
    jobs = [lambda m=m: answers(m, inputs) for m in (one, two)]
    for got, expected in zip(at_once(jobs, 4), want, strict=True):
        assert all(equal(x, expected) for x in got)
    vtc.unwrap(one)
    assert equal(answers(one, inputs), stock) and equal(answers(two, inputs), want[1])
    vtc.unwrap(two)
    assert equal(answers(two, inputs), stock)
    assert one.model.language_model.config._attn_implementation == before


@pytest.mark.parametrize("times", [12, pytest.param(2000, marks=pytest.mark.soak)])
@torch.no_grad()
def test_wrapping_while_another_model_generates(times: int) -> None:
    """Whatever is registered for the whole process must not disturb it."""
    (one, two), inputs = pair("configuration"), PROMPTS[0]
    vtc.wrap(two, METHODS["chain"])
    want, done = answers(two, inputs), Event()

    def wrapping() -> None:
        names = list(METHODS)
        for n in range(times):
            with vtc.compressing(one, METHODS[names[n % len(names)]]):
                if n % 3 == 0:
                    with torch.no_grad():
                        answers(one, inputs)
        done.set()

    thread = Thread(target=wrapping)
    thread.start()
    count = 0
    while not done.is_set() and thread.is_alive():
        assert equal(answers(two, inputs), want)
        count += 1
    thread.join()
    assert done.is_set() and count > 1


def test_the_report_of_another_thread() -> None:
    """A thread that has run nothing reads the last report of any; its own call comes first."""
    model = vtc.wrap(mini.build(), METHODS["divprune"])
    at_once([lambda: model(**mini.prompt(1, batch=1))], 1)
    assert len(model.vtc.report().kept) == 1
    with torch.no_grad():
        model(**mini.prompt(1, batch=3))
    at_once([lambda: model(**mini.prompt(1, batch=2))], 1)
    assert len(model.vtc.report().kept) == 3


@pytest.mark.usefixtures("counting")
def test_threads_that_ended_hold_nothing() -> None:
    model = vtc.wrap(mini.build(), METHODS["chain"])

    held = []
    for _ in range(6):
        at_once([lambda i=i: answers(model, i) for i in PROMPTS[:2]], 1)
        held.append(tensors())
    assert min(held[3:]) <= max(held[:3])  # a leak grows in every round
