# SPDX-License-Identifier: Apache-2.0
"""Ways of calling a compressed LLaVA, each against the masked oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mini_llava as mini
import pytest
import torch
from invariants import greedy_loop
from snapshot import snapshot
from transformers import DynamicCache, QuantizedCache, StaticCache

import vtc
from vtc.benchmarks.support.masked_oracle import compare, masked, recording
from vtc.reduction import Reduction
from vtc.transformers_contract import cache_left, giving


@dataclass(frozen=True, kw_only=True)
class DropLeastAttended(vtc.Method):
    """Drops the visual tokens that the prompt attends to least, after the given layers."""

    name: ClassVar[str] = "test-drop"
    after: tuple[int, ...] = (1,)
    share: float = 0.7

    def on_decoder_layer(self, v: Any) -> Reduction | None:
        if v.layer not in self.after:
            return None
        score = v.tokens.norm(dim=-1) if v.layer < 0 else v.attention("prompt").sum((1, 2))
        n = torch.full((v.hidden.shape[0],), v.count) if v.valid is None else v.valid.sum(1)
        if v.valid is None:
            return Reduction.from_scores(score, int(v.count * self.share))
        return Reduction.from_scores(score, (n * self.share).long(), v.valid)


SCHEDULES = [(-1,), (1,), (0, 2)]
BATCHES = {
    "plain": dict(images_per_row=2, batch=3),
    "left": dict(images_per_row=[1, 2, 1], pad="left"),
}


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("after", SCHEDULES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "how",
    [
        dict(do_sample=False),
        dict(do_sample=False, num_beams=3),
        dict(do_sample=True, num_return_sequences=2, temperature=2.0, top_k=0),
        dict(do_sample=False, prompt_lookup_num_tokens=2),
        dict(do_sample=False, cache_implementation="dynamic"),
    ],
    ids=["greedy", "beams", "sampling", "prompt-lookup", "dynamic"],
)
@torch.no_grad()
def test_generate(attention: str, after: tuple, batch: str, how: dict) -> None:
    if "prompt_lookup_num_tokens" in how:
        batch_of = dict(images_per_row=2, batch=1)  # a limit of Hugging Face
    else:
        batch_of = BATCHES[batch]
    model = vtc.wrap(mini.build("clip", "qwen2", attention), DropLeastAttended(after=after))
    inputs = mini.prompt(**batch_of)

    def run() -> tuple:
        torch.manual_seed(3)
        out = model.generate(
            **inputs, **how, max_new_tokens=8, output_logits=True, return_dict_in_generate=True
        )
        return out.sequences, torch.stack(out.logits, 1)

    (sequences, logits), (want_sequences, want), _ = compare(model, run)
    assert torch.equal(sequences, want_sequences)
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("after", SCHEDULES)
@torch.no_grad()
def test_manual_loop(attention: str, after: tuple) -> None:
    model = vtc.wrap(mini.build("clip", "llama", attention), DropLeastAttended(after=after))
    inputs = mini.prompt(1, batch=2)
    (got, cache), (want, full), alive = compare(model, lambda: greedy_loop(model, inputs))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == full.get_seq_length(), "the cache reports its logical length"
    for i, layer in enumerate(cache.layers):
        assert layer.keys.shape[2] == alive[i].sum(1).max() + 5


@pytest.mark.parametrize("after", SCHEDULES)
@pytest.mark.parametrize("image", [False, True], ids=["text", "second-image"])
@torch.no_grad()
def test_second_turn(attention: str, after: tuple, image: bool) -> None:
    """A conversation on one cache: the second turn, with an image that is compressed as well."""
    model = vtc.wrap(mini.build("clip", "llama", attention), DropLeastAttended(after=after))
    first, second = mini.prompt(1, batch=2, seed=1), mini.prompt(1 if image else 0, batch=2, seed=2)
    if not image:
        second = {"input_ids": torch.tensor([[7, 8, 9], [10, 11, 12]])}
    else:
        del second["attention_mask"]
    length = first["input_ids"].shape[1]

    def second_turn(cache: Any) -> torch.Tensor:
        return greedy_loop(model, second, 3, cache)[0]

    engine = model.vtc.decoder
    with recording(engine) as seen_first:
        _, cache = greedy_loop(model, first, 2)
    with recording(engine) as seen_second:
        got = second_turn(cache)
    layers = model.model.language_model.layers
    engine.remove()
    with masked(layers, seen_first.alive):
        _, cache = greedy_loop(model, first, 2)
        if image:
            with masked(layers, seen_second.alive, start=length + 2):
                want = second_turn(cache)
        else:
            want = second_turn(cache)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_reordering_the_cache_takes_the_map_along() -> None:
    model = vtc.wrap(mini.build(), DropLeastAttended(after=(0, 2)))
    inputs = mini.prompt([1, 1], pad="left")

    def decode(swap: list[int]) -> torch.Tensor:
        cache = cache_left(model(**inputs, use_cache=True))
        order = torch.tensor(swap)
        cache.reorder_cache(order)
        mask = inputs["attention_mask"][order]
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        ids = torch.tensor([[5], [6]])[order]
        positions = mask.cumsum(1)[:, -1:] - 1
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, **giving(model, cache)
        )
        assert all(torch.equal(layer.kept, kept[i][order]) for i, layer in pruned(cache))
        return out.logits[:, -1]

    def pruned(cache: Any) -> list:
        return [(i, layer) for i, layer in enumerate(cache.layers) if hasattr(layer, "kept")]

    kept = {i: layer.kept for i, layer in pruned(cache_left(model(**inputs, use_cache=True)))}
    assert not torch.equal(kept[3][0], kept[3][1])
    torch.testing.assert_close(decode([1, 0]), decode([0, 1]).flip(0), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_two_generations_interleave() -> None:
    model = vtc.wrap(mini.build(), DropLeastAttended(after=(0, 2)))
    a, b = mini.prompt(1, batch=1, seed=1), mini.prompt(2, batch=1, seed=2)
    want_a, want_b = greedy_loop(model, a)[0], greedy_loop(model, b)[0]
    states = [model(**x, use_cache=True) for x in (a, b)]
    logits = [[s.logits[:, -1]] for s in states]
    for _ in range(5):
        for s, seen in zip(states, logits, strict=True):
            token = seen[-1].argmax(-1)[:, None]
            seen.append(model(input_ids=token, **giving(model, cache_left(s))).logits[:, -1])
    torch.testing.assert_close(torch.stack(logits[0], 1), want_a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(logits[1], 1), want_b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_crash_leaves_nothing_behind() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Crash(vtc.Method):
        name: ClassVar[str] = "crash"
        live: ClassVar[list[bool]] = [True]

        def on_decoder_layer(self, v: Any) -> None:
            if v.layer == 2 and self.live[0]:
                raise RuntimeError("boom")

    model, inputs = mini.build(), mini.prompt(1)
    stock, before = model(**inputs).logits, snapshot(model)
    vtc.wrap(model, vtc.chain(DropLeastAttended(after=(0,), share=1.0), Crash()))
    with pytest.raises(RuntimeError, match="boom"):
        model(**inputs)
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    model(**text)
    Crash.live[0] = False
    torch.testing.assert_close(model(**inputs).logits, stock, atol=1e-5, rtol=1e-5)
    vtc.unwrap(model)
    assert snapshot(model) == before


@torch.no_grad()
def test_without_cache(attention: str) -> None:
    model = vtc.wrap(mini.build("clip", "llama", attention), DropLeastAttended(after=(0, 2)))
    inputs = mini.prompt([1, 2], pad="left")
    got, want, alive = compare(model, lambda: model(**inputs, use_cache=False).logits)
    rows = alive[4] & inputs["attention_mask"].bool()
    torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_labels_give_a_loss() -> None:
    model, inputs = mini.build(), mini.prompt(1)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == mini.IMAGE, -100)
    stock = model(**inputs, labels=labels).loss
    vtc.wrap(model, DropLeastAttended(after=(1,)))
    got, want, _ = compare(model, lambda: model(**inputs, labels=labels))
    # Only the row in front of the image predicts a label through a token that may be gone.
    assert got.logits.shape == want.logits.shape
    torch.testing.assert_close(got.loss, want.loss, atol=5e-2, rtol=0)
    assert torch.isfinite(got.loss) and got.loss != stock


@torch.no_grad()
def test_quantized_cache() -> None:
    model = vtc.wrap(mini.build(), DropLeastAttended(after=(0, 2)))
    inputs = mini.prompt(1, batch=2)
    config = model.config.get_text_config()
    try:
        QuantizedCache("fp8", config)
    except (ValueError, ImportError, TypeError) as error:
        pytest.skip(f"this transformers has no fp8 cache: {error}")
    (got, cache), _, _alive = compare(
        model, lambda: greedy_loop(model, inputs, 3, QuantizedCache("fp8", config))
    )
    assert torch.isfinite(got).all()
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 3


@torch.no_grad()
def test_crop_only_what_was_never_compressed() -> None:
    model = vtc.wrap(mini.build(), DropLeastAttended(after=(0,)))
    inputs = mini.prompt(1, batch=1)
    logits, cache = greedy_loop(model, inputs, 4)
    cache.crop(-2)
    again = [logits[:, 2]]
    for _ in range(2):
        out = model(input_ids=again[-1].argmax(-1)[:, None], **giving(model, cache))
        again.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(again, 1), logits[:, 2:], atol=1e-5, rtol=1e-5)
    with pytest.raises(vtc.UnsupportedError, match="cannot crop"):
        cache.crop(-20)


@torch.no_grad()
def test_refused_before_compute() -> None:
    model = vtc.wrap(mini.build(), DropLeastAttended())
    inputs = mini.prompt(1, batch=1)
    config = model.config.get_text_config()
    with pytest.raises(vtc.UnsupportedError, match="DynamicCache"):
        model(**inputs, **giving(model, StaticCache(config=config, max_cache_len=64)))
    with pytest.raises(vtc.UnsupportedError, match="chunked"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)
    vtc.unwrap(model)
    windowed = mini.build("clip", "mistral")
    text = windowed.config.get_text_config()
    text.sliding_window, text._attn_implementation = 8, "flash_attention_2"
    with pytest.raises(vtc.UnsupportedError, match=r"sliding window of 8 tokens.*sdpa"):
        vtc.wrap(windowed, DropLeastAttended())


@torch.no_grad()
def test_text_only_prompt_passes_through() -> None:
    model = mini.build()
    text = {"input_ids": torch.randint(4, 60, (2, 7))}
    stock = model.generate(**text, max_new_tokens=4, do_sample=False)
    vtc.wrap(model, DropLeastAttended())
    assert torch.equal(model.generate(**text, max_new_tokens=4, do_sample=False), stock)


@dataclass(frozen=True, kw_only=True)
class Evict(vtc.Method):
    """Keeps the visual slots with the largest keys, once after prefill and again while decoding."""

    name: ClassVar[str] = "test-evict"
    every: int = 0

    @property
    def while_decoding(self) -> bool:
        return self.every > 0

    def on_cache(self, v: Any) -> Reduction | None:
        if v.step and not (self.every and v.step % self.every == 0):
            return None
        k = int(v.budget[0]) if not v.step else max(1, int(v.visual[0].sum()) - 1)
        score = v.keys.norm(dim=-1).mean(1).masked_fill(~v.visual, torch.inf)
        score = score.masked_fill(score.isinf(), 1e9)
        return Reduction.from_scores(score, k + int((~v.visual[0]).sum()))


@pytest.mark.parametrize("pad", [None, "left"])
@torch.no_grad()
def test_kv_eviction(attention: str, pad: str | None) -> None:
    """Evicted slots are gone from memory, and decoding is as if they were masked."""
    model = mini.build("clip", "llama", attention)
    inputs = mini.prompt(1, batch=2, pad=pad)
    vtc.wrap(model, Evict(keep_tokens=6))
    prefill = model(**inputs, use_cache=True)
    cache, mask = cache_left(prefill), inputs["attention_mask"]
    length = inputs["input_ids"].shape[1]
    assert [layer.keys.shape[2] for layer in cache.layers] == [length - mini.PATCHES + 6] * 5
    kept = [layer.columns(torch.device("cpu")) for layer in cache.layers]
    report = model.vtc.report()
    assert report.kv_bytes == sum(2 * layer.keys.nbytes for layer in cache.layers)
    assert report.kv_bytes_full == report.kv_bytes * length // (length - mini.PATCHES + 6)

    def decode(cache: Any) -> torch.Tensor:
        m, token, out = mask, torch.tensor([[5], [6]]), []
        for _ in range(4):
            m = torch.cat([m, m.new_ones(2, 1)], 1)
            positions = m.cumsum(1)[:, -1:] - 1
            step = model(
                input_ids=token, attention_mask=m, position_ids=positions, **giving(model, cache)
            )
            out.append(step.logits[:, -1])
            token = out[-1].argmax(-1)[:, None]
        return torch.stack(out, 1)

    got = decode(cache)
    vtc.unwrap(model)
    alive = {
        i: torch.zeros(2, length, dtype=torch.bool).scatter(
            1, k[:, : length - mini.PATCHES + 6], True
        )
        for i, k in enumerate(kept)
    }
    full = model(**inputs, use_cache=True)
    with masked(model.model.language_model.layers, alive):
        want = decode(cache_left(full))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_kv_eviction_while_decoding() -> None:
    model = vtc.wrap(mini.build(), Evict(keep_tokens=10, every=2))
    logits, cache = greedy_loop(model, mini.prompt(1, batch=1), 6)
    assert torch.isfinite(logits).all()
    assert cache.layers[0].keys.shape[2] == 8 + 10 + 6 - 3
    assert cache.get_seq_length() == 8 + 16 + 6
    out = model.generate(**mini.prompt(1, batch=2), max_new_tokens=6, num_beams=2)
    assert out.shape[1] == 8 + 16 + 6


@torch.no_grad()
def test_compact_positions() -> None:
    """Dropping in front of layer 0 with renumbering is the model on a shorter prompt."""
    model = mini.build()
    for pad, images in ((None, 1), ("left", [1, 1])):
        inputs = mini.prompt(images, batch=2, pad=pad)
        vtc.wrap(model, DropLeastAttended(after=(-1,), share=0.5, positions="compact"))
        engine = model.vtc.decoder
        with recording(engine) as seen:
            got = model.generate(
                **inputs,
                max_new_tokens=6,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            ).logits
        vtc.unwrap(model)
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == mini.IMAGE).unsqueeze(-1), torch.cat(list(features)))
        keep = seen.alive[0]
        short = torch.stack([e[k] for e, k in zip(embeds, keep, strict=True)])
        short_mask = torch.stack([m[k] for m, k in zip(mask, keep, strict=True)])
        want = model.generate(
            inputs_embeds=short,
            attention_mask=short_mask,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        ).logits
        torch.testing.assert_close(torch.stack(got), torch.stack(want), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_views_tell_the_truth() -> None:
    """Attention rows equal the eager weights; sublayer tensors are those of the modules."""
    seen: dict[str, torch.Tensor] = {}

    @dataclass(frozen=True, kw_only=True)
    class LookAtSublayers(vtc.Method):
        name: ClassVar[str] = "look"
        needs: ClassVar[frozenset[str]] = frozenset({"sublayers"})

        def on_decoder_layer(self, v: Any) -> None:
            if v.layer == 2:
                seen["last"], seen["prompt"] = v.attention("last"), v.attention("prompt")
                seen["sum"] = v.attention_output + v.mlp_output
                seen["hidden"], seen["normed"] = v.hidden, v.attention_input
                seen["rows"], seen["columns"] = v.prompt, v.visual_index

    for attention, pad in (("sdpa", "left"), ("eager", "left"), ("sdpa", None)):
        inputs = mini.prompt([1, 1], pad=pad)
        model = mini.build("clip", "qwen2", attention)
        vtc.wrap(model, LookAtSublayers())
        model(**inputs)
        vtc.unwrap(model)
        reference = mini.build("clip", "qwen2", "eager")
        out = reference(**inputs, output_attentions=True, output_hidden_states=True)
        weights = out.attentions[2]
        columns = seen["columns"][:, None, None, :].expand(
            -1, weights.shape[1], weights.shape[2], -1
        )
        visual = weights.gather(3, columns)
        torch.testing.assert_close(seen["last"][:, :, 0], visual[:, :, -1], atol=1e-5, rtol=1e-4)
        for r in range(2):
            rows = visual[r, :, seen["rows"][r]]
            n = rows.shape[1]
            torch.testing.assert_close(seen["prompt"][r, :, :n], rows, atol=1e-5, rtol=1e-4)
        delta = out.hidden_states[3] - out.hidden_states[2]
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(seen["sum"][real], delta[real], atol=1e-4, rtol=1e-4)
        layer = reference.model.language_model.layers[2]
        normed = layer.input_layernorm(out.hidden_states[2])
        torch.testing.assert_close(seen["normed"][real], normed[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scratch_follows_the_survivors() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Remember(DropLeastAttended):
        name: ClassVar[str] = "remember"

        def on_decoder_layer(self, v: Any) -> Reduction | None:
            if "mark" in v.scratch:
                assert torch.equal(v.scratch["mark"][v.valid], v.position[v.valid])
            v.scratch["mark"] = v.position.clone()
            return super().on_decoder_layer(v)

    model = vtc.wrap(mini.build(), vtc.chain(Remember(after=(0, 2)), DropLeastAttended(after=(1,))))
    model(**mini.prompt([1, 2], pad="left"))


@torch.no_grad()
def test_scratch_crosses_from_encoder_to_llm() -> None:
    """Notes on patches arrive with them: several images, beams, features encoded beforehand."""
    seen: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Carry(vtc.Method):
        name: ClassVar[str] = "carry"

        def on_vision_layer(self, v: Any) -> None:
            if v.layer == 0:
                v.scratch["norm"] = v.x.norm(dim=-1)

        def on_features(self, v: Any) -> Reduction:
            v.scratch["patch"] = v.index.clone()
            return Reduction.from_scores(v.features.norm(dim=-1), 6)

        def on_decoder_layer(self, v: Any) -> None:
            there = torch.ones_like(v.position, dtype=torch.bool) if v.valid is None else v.valid
            assert torch.equal(v.scratch["patch"][there], v.position[there])
            assert (v.scratch["norm"][there] > 0).all()
            seen.append(v.layer)

    model = vtc.wrap(mini.build(), vtc.chain(Carry(), DropLeastAttended(after=(1,))))
    inputs = mini.prompt([2, 1, 1], pad="left")
    model(**inputs)
    model.generate(**inputs, max_new_tokens=2, num_beams=3)
    assert seen == list(range(-1, 4)) * 2
    other = mini.prompt([2, 1, 1], pad="left", seed=9)
    old = model.get_image_features(inputs["pixel_values"])
    model.get_image_features(other["pixel_values"])
    del inputs["pixel_values"]
    with pytest.raises(vtc.UnsupportedError, match="encode and prefill in one call"):
        model(**inputs, mm_encoder_outputs={"image": old})


@torch.no_grad()
def test_merging_between_layers() -> None:
    """A merge in the LLM averages hidden states into the survivor's place."""
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Pair(vtc.Method):
        name: ClassVar[str] = "pair"
        merges: ClassVar[bool] = True

        def on_decoder_layer(self, v: Any) -> Reduction | None:
            if v.layer == 1:
                target = torch.arange(v.count).expand(v.hidden.shape[0], -1) // 2 * 2
                seen.append((v.tokens + 0, v.visual_index[:, ::2]))
                return Reduction.from_merge(target)
            if v.layer == 2:
                assert v.count == mini.PATCHES // 2
            return None

    model = mini.build()
    vtc.wrap(model, Pair())
    captured = []
    handle = model.model.language_model.layers[2].register_forward_pre_hook(
        lambda m, args: captured.append(args[0])
    )
    model(**mini.prompt(1, batch=1))
    handle.remove()
    tokens, _ = seen[0]
    want = tokens.unflatten(1, (-1, 2)).mean(2)
    torch.testing.assert_close(captured[0][:, 3 : 3 + mini.PATCHES // 2], want)


@torch.no_grad()
def test_embeds_instead_of_ids() -> None:
    model, inputs = mini.build(), mini.prompt(1, batch=1)
    vtc.wrap(model, DropLeastAttended(after=(1,)))
    want = model(**inputs).logits
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    got = model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert model.vtc.report().final_tokens == 11


@torch.no_grad()
def test_lazily_created_cache() -> None:
    model, inputs = vtc.wrap(mini.build(), DropLeastAttended(after=(1,))), mini.prompt(1, batch=1)
    want = greedy_loop(model, inputs)[0]
    got, cache = greedy_loop(model, inputs, cache=DynamicCache())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert cache.layers[4].keys.shape[2] < cache.layers[0].keys.shape[2]
