# SPDX-License-Identifier: Apache-2.0
"""An exception anywhere in a call of a wrapped model: it reaches the caller, and nothing is
left."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import mini_llava as mini
import pytest
import torch
from fault_cases import METHODS, answers, equal, facts
from injecting import KINDS, Fault, Place, crossings, entries, fault, lines
from leaks import counting, tensors
from snapshot import snapshot
from style_cases import generated
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support import mini_families
from vtc.transformers_contract import cache_left, giving

__all__ = ["counting"]  # fixtures


def left_behind(model: Any) -> list[str]:
    """State of a forward that engines still hold after it."""
    session = model.vtc
    held = []
    if session.decoder is not None:
        names = ("forward", "pending", "mask", "filling")
        held += [n for n in names if getattr(session.decoder, n) is not None]
        held += ["last_mask"] * (session.decoder.arguments.last_mask is not None)
        held += ["tap" for t in session.decoder.taps if t.open or t.query is not None]
        held += ["video"] * (session.handoff.video is not None)
    if session.vision is not None and session.vision.features.taken is not None:
        held.append("taken")
    return held


def in_cleaning(place: Place) -> bool:
    """Inside the hook that lets go of everything: no one is left to do that then."""
    return place.function in ("_base_post", "_forget", "clear") or "per_thread" in place.file


def survive(
    model: Any,
    method: Any,
    run: Callable[[Any], list[Tensor]],
    choose: Callable[[list[Place]], list[int]],
) -> int:
    """Inject faults into ``run`` of the wrapped model; how many, all of them survived.

    Args:
        choose: of the lines that run, those to raise at; kinds of exception take turns.
    """
    stock = run(model)  # Hugging Face installs hooks of its own at the first call
    bare = snapshot(model)
    vtc.wrap(model, method)
    want, whole = run(model), snapshot(model)
    report, places, count = facts(model), crossings(lambda: run(model)), 0
    for n, at in enumerate(choose(places)):
        error = KINDS[n % len(KINDS)]()
        where = f"{error!r} at {places[at]}, line number {at} of {len(places)}"
        caught = fault(lambda: run(model), at, error)
        assert caught is error, f"{where} came out as {caught!r}"
        if isinstance(error, Exception) and not in_cleaning(places[at]):
            assert not left_behind(model), f"{where} leaves {left_behind(model)}"
        assert snapshot(model) == whole, f"{where} changes the model"
        assert equal(run(model), want), f"after {where} the answer is another one"
        assert facts(model) == report, f"after {where} the report is another one"
        count += 1
        if n % 10 == 0:
            vtc.unwrap(model)
            assert snapshot(model) == bare, f"{where} stays after unwrap"
            assert equal(run(model), stock), f"after {where} the stock answer is another one"
            vtc.wrap(model, method)
            whole = snapshot(model)
            run(model)  # the first call runs other lines than the next ones
    vtc.unwrap(model)
    assert snapshot(model) == bare and equal(run(model), stock)
    return count


# ---- an exception at any place -------------------------------------------------------------------


@torch.no_grad()
def test_a_fault_in_functions() -> None:
    """Every ninth that a chain through encoder, projector, LLM and cache enters."""
    inputs = mini.prompt([1, 2], pad="left")

    def choose(places: list[Place]) -> list[int]:
        return entries(places)[::9]

    assert survive(mini.build(), METHODS["chain"], lambda m: answers(m, inputs), choose) > 45


@pytest.mark.parametrize("name", [name for name in METHODS if name != "chain"])
@torch.no_grad()
def test_a_fault_at_some_lines(name: str) -> None:
    inputs = mini.prompt([1, 2], pad="left")
    survive(
        mini.build(),
        METHODS[name],
        lambda m: answers(m, inputs),
        lambda p: [*range(31, len(p), len(p) // 6)],
    )


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(set(vtc.methods()) - {"evs", "mod"}))  # videos, routers
@torch.no_grad()
def test_a_fault_at_every_line(name: str) -> None:
    """Of every method, where the line is run first and last."""
    inputs = mini.prompt([1, 2], pad="left")
    count = survive(mini.build(), seeded(name, None, 0), lambda m: answers(m, inputs), lines)
    print(f"\n{name}: {count} faults survived")


@pytest.mark.soak
@pytest.mark.parametrize("family", sorted(mini_families.EVERY))
@pytest.mark.parametrize("name", ["divprune", "fastv", "prefixkv"])
@torch.no_grad()
def test_a_fault_in_every_family(family: str, name: str) -> None:
    one, two, three = mini_families.EVERY[family].sizes
    inputs = mini_families.prompt(family, [[one], [two, three]], "left")
    method = vtc.methods()[name](keep_ratio=0.5)
    count = survive(mini_families.build(family), method, lambda m: answers(m, inputs), lines)
    print(f"\n{family}, {name}: {count} faults survived")


@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("family", ["InternVL", "LLaVA-NeXT", "LLaVA-OneVision", "Qwen3-VL"])
@torch.no_grad()
def test_an_interrupt_around_the_encoder(family: str, name: str) -> None:
    """generate() encodes before it calls the model: the next images and videos are compressed."""
    sizes = mini_families.EVERY[family].sizes
    prompts = [mini_families.prompt(family, [[sizes[0]]], None)]
    if family in ("LLaVA-OneVision", "Qwen3-VL"):
        prompts.append(mini_families.video(family))
    model = mini_families.build(family)
    stock = [answers(model, p) for p in prompts]
    vtc.wrap(model, name, keep_ratio=0.5)
    want, count = [answers(model, p) for p in prompts], 0
    assert not any(map(equal, stock, want))
    for p in prompts:
        places = crossings(lambda: answers(model, p))  # noqa: B023
        for at in lines(places):
            if places[at].function in ("_get_features", "_part_of_video", "_telling", "taking"):
                error = KeyboardInterrupt()
                assert fault(lambda: answers(model, p), at, error) is error  # noqa: B023
                for other, answer in zip(prompts, want, strict=True):
                    assert equal(answers(model, other), answer), places[at]
                count += 1
    assert count > 12


@pytest.mark.parametrize("name", ["tome", "pitome", "visionzip"])
@torch.no_grad()
def test_a_fault_in_an_encoder_alone(name: str) -> None:
    """There is no report of images that did not get through, not one of the last ones either."""
    encoder, pixels = mini.build().model.vision_tower, mini.prompt()["pixel_values"]
    method = vtc.methods()[name](keep_tokens=6)
    survive(encoder, method, lambda m: [m(pixels)[0]], lambda places: entries(places)[::9])
    vtc.wrap(encoder, method)
    encoder(pixels)
    encoder.vtc.report()
    assert isinstance(fault(lambda: encoder(pixels[:1]), 300, Fault()), Fault)
    with pytest.raises(RuntimeError, match="not encoded to the end"):
        encoder.vtc.report()


@torch.no_grad()
def test_no_report_of_half_a_forward() -> None:
    """Not of new images with the old prompt, and no time that ran while nothing did."""
    model, inputs = vtc.wrap(mini.build(), METHODS["chain"]), mini.prompt(1)
    want, whole = answers(model, inputs), facts(model)
    for at, place in enumerate(crossings(lambda: model(**inputs))):
        if place.function in ("_middle", "_layer_pre", "run") and at % 9 == 0:
            fault(lambda: model(**inputs), at, Fault())
            with pytest.raises(RuntimeError, match="nothing to report"):
                model.vtc.report()
    model(**inputs)
    assert model.vtc.report().decode_ms is None
    assert equal(answers(model, inputs), want) and facts(model) == whole


@pytest.mark.usefixtures("counting")
@torch.no_grad()
def test_a_failed_forward_holds_no_tensors() -> None:
    """Beyond what the last good one held, whatever kind of exception it was."""
    model, inputs = vtc.wrap(mini.build(), METHODS["chain"]), mini.prompt([1, 2], pad="left")
    model(**inputs)
    held = tensors()
    places = crossings(lambda: model(**inputs))
    for n, at in enumerate(range(100, len(places), len(places) // 8)):
        fault(lambda: model(**inputs), at, KINDS[n % len(KINDS)]())
        if n % len(KINDS) == 1:  # an interrupt passes by all hooks: the next call lets go
            fault(lambda: model(**inputs), 60, Fault())
        assert tensors() <= held, places[at]


# ---- a KV cache in which a forward has failed ----------------------------------------------------


def turn(model: Any, cache: Any, ids: Tensor, **more: Any) -> Tensor:
    """Logits of a turn of a conversation without padding."""
    return model(input_ids=ids, **giving(model, cache), use_cache=True, **more).logits


def unless_refused(run: Callable[[], Tensor]) -> Tensor | None:
    """None where vtc says that the cache is no good."""
    try:
        return run()
    except ValueError as error:
        if "start again with a new cache" not in str(error):
            raise
        return None


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_cache_after_a_failed_forward(name: str) -> None:
    """Used again, it gives the right answer or a clear error, whatever the forward was."""
    model = vtc.wrap(mini.build(), METHODS[name])
    one, two = mini.prompt(1, batch=1, seed=1), mini.prompt(1, batch=1, seed=2)
    turns: list[Callable[[Any], Tensor]] = [
        lambda cache: turn(model, cache, one["input_ids"], pixel_values=one["pixel_values"]),
        lambda cache: turn(model, cache, torch.tensor([[7]])),
        lambda cache: turn(model, cache, two["input_ids"], pixel_values=two["pixel_values"]),
        lambda cache: turn(model, cache, torch.tensor([[8]])),
    ]
    cache = DynamicCache()
    want = [say(cache) for say in turns]
    refused = repeated = 0
    for i, say in enumerate(turns):
        fresh = DynamicCache()
        for earlier in turns[:i]:
            earlier(fresh)
        places = crossings(lambda: say(fresh))  # noqa: B023
        for n, at in enumerate(range(17, len(places), max(len(places) // 4, 1))):
            cache = DynamicCache()
            for earlier in turns[:i]:
                earlier(cache)
            length = cache.get_seq_length()
            error = KINDS[n % len(KINDS)]()
            assert fault(lambda: say(cache), at, error) is error  # noqa: B023
            # Behind the language model, the turn is in the cache and the next one is due.
            then = i + (cache.get_seq_length() > length)
            if then < len(turns):
                got = unless_refused(lambda: turns[then](cache))  # noqa: B023
                assert got is None or torch.equal(got, want[then]), (name, i, places[at])
                refused, repeated = refused + (got is None), repeated + (got is not None)
    assert refused > 3 and repeated > 2


# ---- interrupted generation ----------------------------------------------------------------------


class Nervous(BaseStreamer):
    """Raises at one of the tokens."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.seen = at, error, 0

    def put(self, value: Tensor) -> None:
        self.seen += 1
        if self.seen > self.at:
            raise self.error

    def end(self) -> None:
        pass


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_interrupted_generation(name: str) -> None:
    """By a streamer, a stopping criterion or a logits processor that raises."""
    model, inputs = vtc.wrap(mini.build(), METHODS[name]), mini.prompt(1, batch=1)
    want, whole = answers(model, inputs), snapshot(model)
    for at in (0, 2):
        error = KINDS[at]()

        def raises(ids: Tensor, scores: Any, **_: Any) -> Any:
            if ids.shape[1] > inputs["input_ids"].shape[1] + at:  # noqa: B023
                raise error  # noqa: B023
            return scores

        def stop(ids: Tensor, scores: Any, **_: Any) -> bool:
            return raises(ids, False)

        for how in (
            {"streamer": Nervous(at, error)},
            {"stopping_criteria": [stop]},
            {"logits_processor": [raises]},
        ):
            with pytest.raises(type(error)) as caught:
                model.generate(**inputs, max_new_tokens=6, **how)
            assert caught.value is error
        assert not left_behind(model) and snapshot(model) == whole
        assert equal(answers(model, inputs), want)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_conversation_goes_on_after_an_interrupt(name: str) -> None:
    """Between two forwards a cache is whole: what follows is as if nothing had happened."""
    model, inputs = vtc.wrap(mini.build(), METHODS[name]), mini.prompt(1, batch=1)
    want, _ = generated(model, inputs, max_new_tokens=6)
    for at in (1, 3):
        cache = DynamicCache()
        how = {**giving(model, cache), "streamer": Nervous(at + 1, Fault())}
        with pytest.raises(Fault):
            model.generate(**inputs, max_new_tokens=6, do_sample=False, **how)
        past = cache.get_seq_length()
        rest = []
        while past + len(rest) < want.shape[1]:
            token = want[:, past + len(rest) : past + len(rest) + 1]
            logits = turn(model, cache, token)
            rest.append(logits[:, -1].argmax(-1))
        assert torch.equal(torch.stack(rest, 1)[:, :-1], want[:, past + 1 :]), name


@pytest.mark.usefixtures("counting")
@torch.no_grad()
def test_abandoned_loops() -> None:
    """Generators that are dropped halfway, with the prompt or a token in the model."""
    model, inputs = vtc.wrap(mini.build(), METHODS["chain"]), mini.prompt(1, batch=1)
    want = answers(model, inputs)

    def tokens(seed: int) -> Any:
        out = model(**mini.prompt(1, batch=1, seed=seed), use_cache=True)
        while True:
            token = out.logits[:, -1:].argmax(-1)
            yield token
            out = model(input_ids=token, **giving(model, cache_left(out)))

    held = None
    for n in range(4):
        loops = [tokens(seed) for seed in range(3)]
        for loop in loops[: n + 1]:
            next(loop), next(loop)
        loops[0].close()
        del loops, loop
        held = held or tensors()
        assert tensors() <= held
    assert equal(answers(model, inputs), want)


@torch.no_grad()
def test_generation_stopped_in_its_thread() -> None:
    """As a server stops it when the reader has gone; the report is that of the thread's call."""
    model, inputs = vtc.wrap(mini.build(), METHODS["chain"]), mini.prompt(1, batch=1)
    want, whole = answers(model, inputs), facts(model)
    model = vtc.wrap(mini.build(), METHODS["chain"])
    stop, out = Event(), []

    def stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if ids.shape[1] == inputs["input_ids"].shape[1] + 4:
            stop.set()
        return torch.full((len(ids),), stop.is_set())

    def run() -> None:
        criteria = StoppingCriteriaList([stopped])  # type: ignore[list-item]
        out.append(model.generate(**inputs, max_new_tokens=500, stopping_criteria=criteria))

    thread = Thread(target=run)
    thread.start()
    thread.join(60)
    assert out[0].shape[1] == inputs["input_ids"].shape[1] + 4
    assert facts(model) == whole  # this thread has run nothing
    assert equal(answers(model, inputs), want)
