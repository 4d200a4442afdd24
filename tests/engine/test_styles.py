# SPDX-License-Identifier: Apache-2.0
"""Every way of calling a compressed model, for a method of each stage, against the masked oracle.

Contrastive search and DoLa left transformers itself before 5.0: ``penalty_alpha`` and
``dola_layers`` now run code from the Hub (``custom_generate="transformers-community/..."``), which
is not downloaded here. `test_own_decoding_loop` runs what such code does: a callable
``custom_generate`` with `prepare_inputs_for_generation` and a cache of its own.
"""

from __future__ import annotations

from typing import Any

import mini_llava as mini
import pytest
import torch
from style_cases import (
    CLOSE,
    METHODS,
    against_oracle,
    compare_codes,
    generated,
    name,
    same,
    wrapped,
)
from torch import Tensor

import vtc
from vtc.benchmarks.support.masked_oracle import compare, masked, recording
from vtc.transformers_contract import cache_left, giving

__all__ = ["name"]  # fixtures


IN_FRONT = ["pitome", "visionzip", "divprune"]


def interleaved(pad: str | None = "left", seed: int = 0) -> dict[str, Tensor]:
    """Text between images, two images side by side, an image at the very start; rows of 3, 1, 2."""
    g = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(4, 60, (n,), generator=g).tolist()

    image = [mini.IMAGE] * mini.PATCHES
    rows = [
        words(3) + image + words(2) + image + image + words(4),
        image + words(6),
        words(1) + image + words(5) + image + words(2),
    ]
    pixels = torch.randn(6, 3, mini.SIZE, mini.SIZE, generator=g)
    return {**mini.padded(rows, pad), "pixel_values": pixels}


# ---- generate() ----------------------------------------------------------------------------------

HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=3, num_return_sequences=2),
    "sampling": dict(do_sample=True, num_return_sequences=3, temperature=2.0, top_k=0),
    "beam-sampling": dict(do_sample=True, num_beams=2, temperature=2.0),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_generate(name: str, how: str, pad: str) -> None:
    """Interleaved text and images, padded on either side; samples are drawn with one seed."""
    model = wrapped(name, decoder="qwen2", attention="eager" if pad == "right" else "sdpa")
    inputs = interleaved(pad)
    stock = generated(vtc.unwrap(model), inputs, **HOW[how])[1]
    vtc.wrap(model, METHODS[name])
    got, want = against_oracle(name, model, lambda: generated(model, inputs, **HOW[how]))
    same(got, want)
    assert (got[1] - stock).abs().max() > 1e-3, "no teeth"


@torch.no_grad()
def test_assisted(name: str) -> None:
    """Drafts of a smaller model, and of the prompt itself (one row: a limit of Hugging Face)."""
    assistant = mini.build(seed=5)
    inputs = mini.prompt(2, batch=1)
    model = wrapped(name)
    plain = generated(vtc.unwrap(model), inputs, max_new_tokens=12)[1]
    vtc.wrap(model, METHODS[name])
    for how in (dict(assistant_model=assistant), dict(prompt_lookup_num_tokens=2)):
        got, want = against_oracle(
            name, model, lambda how=how: generated(model, inputs, max_new_tokens=12, **how)
        )
        same(got, want)
    if name in IN_FRONT:  # what they choose does not depend on drafts
        assert torch.equal(got[0], generated(model, inputs, max_new_tokens=12)[0])
    assert (got[1] - plain).abs().max() > 1e-3, "no teeth"


@torch.no_grad()
def test_own_decoding_loop(name: str) -> None:
    """A callable ``custom_generate``, as contrastive search and DoLa are now: top 2 re-scored."""

    def search(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
        for key in ("logits_processor", "stopping_criteria", "synced_gpus", "streamer"):
            kwargs.pop(key, None)
        for step in range(4):
            inputs = model.prepare_inputs_for_generation(
                input_ids if step == 0 else input_ids[:, -1:],
                is_first_iteration=step == 0,
                **kwargs,
            )
            out = model(**inputs, output_hidden_states=True, return_dict=True)
            best = out.logits[:, -1].topk(2).indices
            last = out.hidden_states[-1][:, -1:]
            near = torch.cosine_similarity(model.get_input_embeddings()(best), last, dim=-1)
            token = best.gather(1, near.argmin(1, keepdim=True))
            input_ids = torch.cat([input_ids, token], 1)
            kwargs = model._update_model_kwargs_for_generation(out, kwargs)
        return input_ids

    model, inputs = wrapped(name), interleaved()
    got, want = against_oracle(
        name, model, lambda: model.generate(**inputs, custom_generate=search, use_cache=True)
    )
    assert got.shape[1] == inputs["input_ids"].shape[1] + 4
    assert torch.equal(got, want)


@torch.no_grad()
def test_embeds_into_generate(name: str) -> None:
    """``inputs_embeds`` beside the pixels: placeholders are known by their embedding."""
    model, inputs = wrapped(name), interleaved()
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    given = {**inputs, "inputs_embeds": embeds}
    del given["input_ids"]
    (tokens, logits), want = against_oracle(name, model, lambda: generated(model, given))
    same((tokens, logits), want)
    by_ids = generated(model, inputs)
    torch.testing.assert_close(logits, by_ids[1], **CLOSE)
    assert torch.equal(tokens[:, -8:], by_ids[0][:, -8:])


@torch.no_grad()
def test_without_cache(name: str) -> None:
    """Every step runs the whole prompt again; a method that acts on the cache has nothing to do."""
    model, inputs = wrapped(name), interleaved()
    if name in ("prefixkv", "vidkv"):
        got = generated(model, inputs, use_cache=False)
        vtc.unwrap(model)
        same(got, generated(model, inputs, use_cache=False))
        return
    ids, mask, steps = inputs["input_ids"], inputs["attention_mask"], []
    for _ in range(3):
        now = {**inputs, "input_ids": ids, "attention_mask": mask}
        got, want, _ = compare(model, lambda now=now: model(**now, use_cache=False).logits[:, -1])
        torch.testing.assert_close(got, want, **CLOSE)
        steps.append(got)
        ids = torch.cat([ids, got.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    tokens, logits = generated(model, inputs, use_cache=False, max_new_tokens=3)
    assert torch.equal(tokens, ids)
    torch.testing.assert_close(logits, torch.stack(steps, 1), **CLOSE)


# ---- conversations -------------------------------------------------------------------------------


@torch.no_grad()
def test_three_turns(name: str) -> None:
    """generate() on one cache: an image, then text, then another image; rows padded on the left."""
    model = wrapped(name)
    first, second = mini.prompt([1, 2], pad="left", seed=1), mini.prompt(1, batch=2, seed=2)
    words = torch.tensor([[7, 8, 9], [10, 11, 12]])
    padding = first["attention_mask"]

    def say(ids: Tensor, out: Any = None, pixels: Tensor | None = None) -> Any:
        """The answer to all tokens so far, those of the last answer in front of the new ones."""
        given: dict[str, Any] = {} if pixels is None else {"pixel_values": pixels}
        if out is not None:
            ids = torch.cat([out.sequences, ids], 1)
            given |= giving(model, cache_left(out))
        mask = torch.ones_like(ids)
        mask[:, : padding.shape[1]] = padding
        how = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        return model.generate(
            input_ids=ids, attention_mask=mask, **given, **how, output_logits=True
        )

    def opening() -> tuple[Any, list[Tensor]]:
        one = say(first["input_ids"], pixels=first["pixel_values"])
        two = say(words, one)
        return two, [*one.logits, *two.logits]

    def closing(two: Any) -> list[Tensor]:
        return list(say(second["input_ids"], two, second["pixel_values"]).logits)

    if name == "vidkv":

        def whole() -> Tensor:
            two, logits = opening()
            return torch.stack(logits + closing(two), 1)

        got, want = compare_codes(model, whole)
    else:
        engine = model.vtc.decoder
        with recording(engine) as seen_first:
            two, head = opening()
        start = cache_left(two).get_seq_length()  # what is said last is not in it yet
        with recording(engine) as seen_second:
            tail = closing(two)
        got, layers = torch.stack(head + tail, 1), engine.sites.decoder.layers
        engine.remove()
        with masked(layers, seen_first.alive):
            two, head = opening()
            with masked(layers, seen_second.alive, start=start):
                tail = closing(two)
        engine.install()
        want = torch.stack(head + tail, 1)
    torch.testing.assert_close(got, want, **CLOSE)
    assert got.shape[1] == 9


# ---- caches --------------------------------------------------------------------------------------


@torch.no_grad()
def test_chunked_prefill(name: str) -> None:
    """Refused before any LLM layer runs; inputs compressed beforehand can be cut anywhere."""
    model, inputs = wrapped(name), mini.prompt(2, batch=2)
    ran: list[int] = []
    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(vtc.UnsupportedError, match=r"chunked prefill.*vtc\.compress_inputs"):
        generated(model, inputs, prefill_chunk_size=7)
    handle.remove()
    assert not ran
    if name not in IN_FRONT:
        return
    whole = generated(model, inputs)[1]
    vtc.unwrap(model)
    for how in (dict(prefill_chunk_size=7), dict(cache_implementation="static"), {}):
        short = vtc.compress_inputs(model, inputs, METHODS[name])
        torch.testing.assert_close(generated(model, short, **how)[1], whole, **CLOSE)


def quantized(model: Any, backend: str) -> Any:
    from transformers import QuantizedCache

    options = {} if backend == "fp8" else dict(nbits=4, q_group_size=8, residual_length=4)
    try:
        return QuantizedCache(backend, model.config.get_text_config(), **options)
    except (ImportError, ValueError, TypeError) as error:
        pytest.skip(f"no {backend} cache here: {error}")


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
@torch.no_grad()
def test_quantized_cache(name: str, backend: str) -> None:
    """Hugging Face's own quantized caches hold the short sequence, as compressed inputs would.

    quanto compiles for a minute and is no test dependency; its cases were run by hand.
    """
    model, inputs = wrapped(name), mini.prompt(2, batch=1)

    def run(given: dict[str, Any]) -> tuple[Tensor, Any]:
        cache = quantized(model, backend)
        return generated(model, given, **giving(model, cache))[1], cache

    if name in ("prefixkv", "vidkv", "chain"):
        with pytest.raises(vtc.UnsupportedError, match=r"dequantize.*DynamicCache"):
            run(inputs)
        return
    got, cache = run(inputs)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 7
    short = [9 if name == "pitome" else 6] * 5
    if name == "fastv":
        short[:2] = [mini.PATCHES] * 2
    for layer, left in zip(cache.layers, short, strict=True):
        dropped = getattr(layer, "dropped", 0)  # a layer that lost nothing is a stock one
        assert dropped == 2 * (mini.PATCHES - left)
    plain = generated(model, inputs)[1]
    assert 1e-6 < (got - plain).abs().mean() < 0.5 * plain.std(), "quantized, and not far off"
    vtc.unwrap(model)
    if name in IN_FRONT:
        want, _ = run(vtc.compress_inputs(model, inputs, METHODS[name]))
        torch.testing.assert_close(got, want, **CLOSE)
