# SPDX-License-Identifier: Apache-2.0
"""Methods of the KV cache and of single layers, against forwards and codecs written by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import mini_llava as mini
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtc
from vtc.benchmarks.oracle import masked
from vtc.cache import cache_bytes, pruned_layer, take_rows
from vtc.methods.fastv import FastV
from vtc.methods.mod import HeuristicMoD, MoD, Routers, best_of_each
from vtc.methods.prefixkv import PrefixKV, allocate, prefix_counts
from vtc.methods.vidkv import VidKV, relevance
from vtc.methods.zipvl import ZipVL, probe_rows, token_budget
from vtc.quantized import (
    Affine,
    MixedKeys,
    Packing,
    Ternary,
    from_spectrum,
    pack_bits,
    pack_layer,
    pack_trits,
    to_spectrum,
    unpack_bits,
    unpack_trits,
)
from vtc.transformers_contract import cache_left, giving

ROWS = [1, 2, 1]
CLOSE: dict[str, float] = dict(atol=1e-5, rtol=1e-5)


def positioned(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the positions that generate() passes: a row has its own, padded or not."""
    positions = inputs["attention_mask"].cumsum(1) - 1
    return {**inputs, "position_ids": positions.clamp(min=0)}


def rows_alone(inputs: dict[str, Tensor], images: list[int]) -> list[dict[str, Tensor]]:
    """Each row of a batch without its padding and mates."""
    out, image = [], 0
    for r, n in enumerate(images):
        real = inputs["attention_mask"][r].bool()
        out.append(
            {
                "input_ids": inputs["input_ids"][r : r + 1, real],
                "pixel_values": inputs["pixel_values"][image : image + n],
            }
        )
        image += n
    return out


def decode(model: Any, inputs: dict, cache: Any, tokens: Tensor) -> Tensor:
    """Logits (B, S, V) of given tokens (B, S), fed one by one."""
    mask, out = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])), []
    for i in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        step = model(
            input_ids=tokens[:, i : i + 1],
            attention_mask=mask,
            position_ids=mask.cumsum(1)[:, -1:] - 1,
            **giving(model, cache),
        )
        out.append(step.logits[:, -1])
    return torch.stack(out, 1)


def some_tokens(batch: int, steps: int) -> Tensor:
    return torch.randint(4, 60, (batch, steps), generator=torch.Generator().manual_seed(7))


# ---- a Llama decoder by hand, with tokens that jump over layers ------------------------------------

Choose = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
"""(layer, x (T, D), attention maps (H, T, T) of that layer on all tokens, visual (T,)) -> (T,)."""


def by_hand(
    model: Any, inputs: dict[str, Tensor], tokens: Tensor, choose: Choose, over: str
) -> tuple[Tensor, Tensor, list[int]]:
    """Prefill logits (T, V), step logits (S, V) and KV lengths of one row, in plain loops."""
    lm, config = model.model.language_model, model.config.text_config
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, lm.layers[0]
    dim = dim.self_attn.head_dim
    ids = inputs["input_ids"][0]
    visual = ids == mini.IMAGE
    x = model.get_input_embeddings()(ids)
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    x[visual] = features.flatten(0, -2)
    frequency = 10000.0 ** (-torch.arange(0, dim, 2).float() / dim)

    def rope(t: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None].float() * frequency
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        a, b = t[..., : dim // 2], t[..., dim // 2 :]
        return t * cos + torch.cat([-b, a], -1) * sin

    def heads_of(name: str, layer: Any, u: Tensor) -> Tensor:
        return getattr(layer.self_attn, name)(u).unflatten(1, (-1, dim)).transpose(0, 1)

    def maps(q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        k = k.repeat_interleave(heads // kv, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(dim)
        return scores.masked_fill(k_at[None, None] > q_at[None, :, None], -torch.inf).softmax(-1)

    held: list[tuple[Tensor, Tensor, Tensor]] = []

    def run(x: Tensor, at: Tensor, visual: Tensor, first: bool) -> Tensor:
        for i, layer in enumerate(lm.layers):
            u = layer.input_layernorm(x)
            q, k = (rope(heads_of(n, layer, u), at) for n in ("q_proj", "k_proj"))
            v = heads_of("v_proj", layer, u)
            here = torch.ones(len(x), dtype=torch.bool)
            if first:
                chosen = choose(i, x, maps(q, k, at, at), visual)
                here = here if chosen is None else chosen
                held.append((k[:, here], v[:, here], at[here]))
            else:
                past = held[i]
                held[i] = (
                    torch.cat([past[0], k], 1),
                    torch.cat([past[1], v], 1),
                    torch.cat([past[2], at]),
                )
            keys, values, k_at = held[i]
            mixed = maps(q[:, here], keys, at[here], k_at)
            mixed = mixed @ values.repeat_interleave(heads // kv, 0)
            y = x.clone()
            y[here] = x[here] + layer.self_attn.o_proj(mixed.transpose(0, 1).flatten(1))
            after = y + layer.mlp(layer.post_attention_layernorm(y))
            x = torch.where(here[:, None], after, x) if over == "layer" else after
        return model.lm_head(lm.norm(x))

    prefill = run(x, torch.arange(len(x)), visual, True)
    lengths = [h[0].shape[1] for h in held]
    steps = []
    for i, token in enumerate(tokens):
        x = model.get_input_embeddings()(token[None])
        steps.append(run(x, torch.tensor([len(ids) + i]), torch.zeros(1).bool(), False)[0])
    return prefill, torch.stack(steps), lengths


def against_hand(method: vtc.Method, choose: Choose, pad: str | None, attention: str) -> None:
    """A batch with ragged rows, prefill and five steps, row by row against the loops above."""
    images = ROWS if pad else [1, 1, 1]
    inputs, tokens = positioned(mini.prompt(images, batch=3, pad=pad)), some_tokens(3, 5)
    stock = mini.build(attention=attention)
    want = [
        by_hand(stock, row, tokens[r], choose, method.bypass)
        for r, row in enumerate(rows_alone(inputs, images))
    ]
    plain = stock(**inputs, use_cache=True)
    model = vtc.wrap(mini.build(attention=attention), method)
    out = model(**inputs, use_cache=True)
    layers = cache_left(out).layers
    # A short row takes its padding along to fill up.
    longest = [max(w[2][i] for w in want) for i in range(5)]
    padding = [max(w[2][i] + int((~m.bool()).sum()) for w, m in zip(
        want, inputs["attention_mask"], strict=True)) for i in range(5)]  # fmt: skip
    for i, layer in enumerate(layers):
        assert longest[i] <= layer.keys.shape[2] <= padding[i]
    steps = decode(model, inputs, cache_left(out), tokens)
    for r, (prefill, step, _) in enumerate(want):
        real = inputs["attention_mask"][r].bool()
        torch.testing.assert_close(out.logits[r, real], prefill, atol=1e-4, rtol=1e-4)
        assert (out.logits[r, real] - plain.logits[r, real]).abs().max() > 1e-2, "no teeth"
        if pad != "right":
            torch.testing.assert_close(steps[r], step, atol=1e-4, rtol=1e-4)


CASES = [(None, "sdpa"), ("left", "sdpa"), ("left", "eager"), ("right", "sdpa")]


def test_rows_of_a_rotary_table_with_and_without_a_batch() -> None:
    table, index = torch.randn(3, 2, 5, 4), torch.tensor([[0, 3, 3], [2, 1, 4]])
    rows = torch.stack([part[torch.arange(2)[:, None], index] for part in table])
    assert torch.equal(take_rows(table, index), rows)  # M-RoPE: three tables
    assert torch.equal(take_rows(table[0], index), rows[0])
    assert torch.equal(take_rows(table[0, :1], index), table[0, 0][index])
    assert torch.equal(take_rows(table[0, 0], index), table[0, 0][index])


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_the_last_tokens_of_a_compressed_prompt_can_be_taken_back(rows: int) -> None:
    model = mini.build()
    inputs = mini.prompt([1] * rows)
    with vtc.compressing(model, "fastv", keep_tokens=4):
        out = model(**inputs, use_cache=True)
        cache, length = cache_left(out), inputs["input_ids"].shape[1]
        cache.crop(-2)
        assert cache.get_seq_length() == length - 2
        again = model(input_ids=inputs["input_ids"][:, -2:], **giving(model, cache))
    torch.testing.assert_close(again.logits, out.logits[:, -2:], atol=1e-5, rtol=1e-5)


# ---- ZipVL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau, p", [(0.96, 5), (0.975, 5), (0.5, 2)])
def test_zipvl_golden(tau: float, p: int) -> None:
    a = torch.tensor([[0.4, 0.3, 0.2, 0.05, 0.03, 0.02]])
    assert token_budget(a, tau, torch.ones(1), torch.zeros(1)).tolist() == [p]
    text = torch.full((1,), 1.0)  # as much again on text
    assert token_budget(a, tau, 1 + text, text).item() <= p


def test_probe_rows() -> None:
    real = torch.ones(3, 400, dtype=torch.bool)
    real[1, :100] = False
    real[2, :330] = False
    rows, alive = probe_rows(real)
    assert alive.sum(1).tolist() == [128, 128, 70]
    for r, first in enumerate((0, 100, 330)):
        mine = set(rows[r, alive[r]].tolist())
        assert set(range(max(first, 336), 400)) <= mine <= set(range(first, 400))
        alone = probe_rows(real[r : r + 1, first:])
        assert mine == {c + first for c in alone[0][alone[1]].tolist()}
    assert set(probe_rows(real[:1], seed=1)[0][0].tolist()) != set(rows[0].tolist())


def zipvl_by_hand(k: int | None, tau: float, recent: int | None = None) -> Choose:
    def choose(i: int, x: Tensor, maps: Tensor, visual: Tensor) -> Tensor:
        n = len(x)
        first = 0 if recent is None else n - recent
        a = [sum(float(maps[:, c, j].mean()) for c in range(first, n)) for j in range(n)]
        seen = [sum(c >= j for c in range(first, n)) for j in range(n)]
        image = [j for j in range(n) if visual[j]]
        count = k * (len(image) // mini.PATCHES) if k is not None else 0
        if k is None:
            mass = sum(a[j] for j in range(n) if not visual[j])
            for value in sorted((a[j] for j in image), reverse=True):
                count, mass = count + 1, mass + value
                if mass >= tau * (n - first):
                    break
        best = sorted(image, key=lambda j: (-a[j] / seen[j], j))[:count]
        return ~visual | torch.tensor([j in best for j in range(n)])

    return choose


@pytest.mark.parametrize("pad, attention", CASES)
@torch.no_grad()
def test_zipvl_by_hand(pad: str | None, attention: str) -> None:
    against_hand(ZipVL(keep_tokens=6), zipvl_by_hand(6, 0), pad, attention)
    against_hand(ZipVL(tau=0.8), zipvl_by_hand(None, 0.8), pad, attention)
    few = ZipVL(tau=0.7, recent=5, random=0)
    against_hand(few, zipvl_by_hand(None, 0.7, recent=5), pad, attention)


def test_zipvl_parameters() -> None:
    assert not ZipVL().has_budget and ZipVL(keep_ratio=0.5).has_budget
    assert ZipVL().stages == {"bypass"} and ZipVL(kv="mixed").stages == {"cache"}
    for wrong in (dict(tau=0), dict(recent=0), dict(random=-1), dict(kv="no"), dict(group=12)):
        with pytest.raises(ValueError):
            ZipVL(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tau or a budget"):
        ZipVL(tau=0.9, keep_ratio=0.5)
    assert ZipVL().share == 0.975 and ZipVL(tau=0.9).share == 0.9
    with pytest.raises(ValueError, match="set tau"):
        ZipVL(kv="mixed", keep_ratio=0.5)


# ---- MoD -------------------------------------------------------------------------------------------


def test_best_of_each() -> None:
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 6, (2, 12), generator=g).float()
    image = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5, [0] * 5 + [1] * 4 + [7] * 3])
    valid = torch.tensor([[True] * 12, [True] * 9 + [False] * 3])
    keep = torch.tensor([[2, 1, 3], [1, 4, 0]])
    got = best_of_each(score, image, keep, valid)
    for b in range(2):
        want = set()
        for i in range(3):
            mine = [j for j in range(12) if valid[b, j] and image[b, j] == i]
            want |= set(sorted(mine, key=lambda j: (-float(score[b, j]), j))[: int(keep[b, i])])
        assert set(got[b].nonzero()[:, 0].tolist()) == want


def mod_by_hand(layers: tuple[int, ...], score: Callable, k: int = 3) -> Choose:
    seen: dict[int, Tensor] = {}

    def choose(i: int, x: Tensor, maps: Tensor, visual: Tensor) -> Tensor | None:
        seen[i] = maps
        if i not in layers:
            return None
        scores = score(i, x, seen.get(i - 1))
        keep = ~visual
        image = visual.nonzero()[:, 0].split(mini.PATCHES)
        for columns in image:  # 20 % of each
            best = sorted(columns.tolist(), key=lambda j: (-float(scores[j]), j))[:k]
            keep[best] = True
        return keep

    return choose


@pytest.mark.parametrize("pad, attention", CASES)
@torch.no_grad()
def test_mod_by_hand(pad: str | None, attention: str) -> None:
    g = torch.Generator().manual_seed(1)
    routers = {i: torch.randn(48, generator=g) for i in (0, 2, 4)}
    routed = mod_by_hand((0, 2, 4), lambda i, x, before: x @ routers[i])
    against_hand(MoD(routers=routers), routed, pad, attention)
    attended = mod_by_hand((1, 3), lambda i, x, before: before[:, -1].mean(0))
    against_hand(HeuristicMoD(), attended, pad, attention)


@torch.no_grad()
def test_mod_reads_routers(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    weights = {
        "layers.1.router.weight": torch.randn(1, 48),
        "layers.3.router.weight": torch.ones(48),
    }
    save_file({**weights, "layers.1.router.bias": torch.ones(1)}, tmp_path / "routers.safetensors")
    method = MoD(routers=str(tmp_path / "routers.safetensors"))
    assert (
        sorted(method.routers) == [1, 3] and str(method) == "mod(routers=<routers of layers 1, 3>)"
    )
    inputs = mini.prompt(1)
    model = vtc.wrap(mini.build(), method)
    got = model(**inputs).logits
    vtc.unwrap(model)
    vtc.wrap(model, MoD(routers={1: weights["layers.1.router.weight"][0], 3: torch.ones(48)}))
    assert torch.equal(model(**inputs).logits, got)
    assert model.vtc.report().tokens_per_layer == [16, 3, 16, 3, 16]
    vtc.unwrap(model)

    with pytest.raises(vtc.UnsupportedError, match="routers"):
        vtc.wrap(model, "mod")
    with pytest.raises(vtc.UnsupportedError, match="5 layers"):
        vtc.wrap(model, MoD(routers={9: torch.ones(48)}))
    with pytest.raises(ValueError, match="no router weights"):
        Routers.read({"weight": torch.ones(48)})
    with pytest.raises(ValueError, match="two router weights"):
        Routers.read({"a.1.b": torch.ones(4), "c.1.d": torch.ones(4)})
    with pytest.raises(ValueError, match="no router for layers"):
        MoD(routers={1: torch.ones(48)}, layers=(2,))
    with pytest.raises(ValueError, match="neighbours"):
        HeuristicMoD(layers=(1, 2))
    with pytest.raises(ValueError, match="48 dimensions"):
        vtc.wrap(model, MoD(routers={1: torch.ones(4)}))(**inputs)


@torch.no_grad()
def test_mod_by_transition() -> None:
    """Another router, another choice; the budget is the same."""
    inputs = mini.prompt(ROWS, pad="left")
    model = mini.build()
    out = []
    for router in ("attention", "ttv"):
        vtc.wrap(model, HeuristicMoD(router=router, keep_tokens=5))
        out.append(model(**inputs).logits)
        counts = model.vtc.report().tokens_per_layer
        assert counts[1] == counts[3] == pytest.approx(5 * 4 / 3)
        vtc.unwrap(model)
    assert not torch.allclose(*out, atol=1e-2)


# ---- PrefixKV --------------------------------------------------------------------------------------

SHARES = [[0.5, 0.2, 0.1, 0.05, 0.05, 0.04, 0.03, 0.01, 0.01, 0.01], [0.1] * 10]


@pytest.mark.parametrize("p, counts", [(0.55, [2, 6]), (0.75, [3, 8]), (0.85, [4, 9])])
def test_prefixkv_golden(p: float, counts: list[int]) -> None:
    mass = torch.tensor(SHARES, dtype=torch.float64)
    assert prefix_counts(mass, p).tolist() == counts
    total = torch.tensor([sum(counts)])
    assert allocate(mass[None], torch.full((1, 2), 10), total)[0].tolist() == counts


def allocate_by_hand(mass: list[list[float]], allowed: list[int], total: int) -> list[int]:
    """Raise p step by step over all shares at which some layer gets one more slot."""
    curves = []
    for layer in mass:
        sums, so_far = [], 0.0
        for value in sorted(layer, reverse=True):
            so_far += value / sum(layer)
            sums.append(so_far)
        curves.append(sums)

    def counts(p: float) -> list[int]:
        return [
            min(a, sum(share < p for share in sums) + 1)
            for sums, a in zip(curves, allowed, strict=True)
        ]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle)) <= total else (low, middle)
    return counts(low)


def test_allocation_is_the_limit_of_the_bisection() -> None:
    g = torch.Generator().manual_seed(0)
    mass = torch.rand(4, 6, 40, generator=g) ** 4
    allowed = torch.randint(5, 41, (4, 6), generator=g)
    total = torch.tensor([30, 60, 90, 1000])
    got = allocate(mass, allowed, total)
    assert got.sum(1).tolist() == torch.minimum(total, allowed.sum(1)).tolist()
    for b in range(3):
        want = allocate_by_hand(mass[b].double().tolist(), allowed[b].tolist(), int(total[b]))
        assert got[b].tolist() == want
    ties = allocate(torch.ones(1, 3, 8), torch.full((1, 3), 8), torch.tensor([7]))
    assert ties.tolist() == [[3, 2, 2]]


def column_sums(stock: Any, row: dict[str, Tensor]) -> list[Tensor]:
    """(T,) attention each slot gets in each layer, from eager maps."""
    return [a[0].mean(0).sum(0) for a in stock(**row, output_attentions=True).attentions]


def kept_columns(cache: Any, r: int, skip: int) -> list[list[int]]:
    """For each layer the slots that row r holds, counted from its first token."""
    out = []
    for layer in cache.layers:
        columns = layer.columns(torch.device("cpu"))[r]
        there = ~layer.padded("filler", torch.device("cpu"))[r] & (columns >= skip)
        out.append(sorted((columns[there] - skip).tolist()))
    return out


@pytest.mark.parametrize("pad, attention", CASES)
@torch.no_grad()
def test_prefixkv_keeps_the_prefix(pad: str | None, attention: str) -> None:
    images = ROWS if pad else [1, 1, 1]
    inputs = mini.prompt(images, batch=3, pad=pad)
    model = vtc.wrap(mini.build(attention=attention, gain=9), PrefixKV(keep_tokens=5))
    cache = cache_left(model(**inputs, use_cache=True))
    stock = mini.build(attention="eager", gain=9)
    uneven = False
    for r, row in enumerate(rows_alone(inputs, images)):
        visual = (row["input_ids"][0] == mini.IMAGE).nonzero()[:, 0].tolist()
        sums = [c.tolist() for c in column_sums(stock, row)]
        mass = [[c[j] for j in visual] for c in sums]
        counts = allocate_by_hand(mass, [len(visual)] * 5, 5 * 5 * images[r])
        assert sum(counts) == 25 * images[r]
        uneven |= len(set(counts)) > 1
        first = int(inputs["attention_mask"][r].long().argmax())
        for c, count, held in zip(sums, counts, kept_columns(cache, r, first), strict=True):
            best = sorted(visual, key=lambda j: (-c[j], j))[:count]
            text = set(range(row["input_ids"].shape[1])) - set(visual)
            assert set(held) & set(range(row["input_ids"].shape[1])) == text | set(best)
    assert uneven, "every layer the same: no teeth"


def hide(cache: Any, length: int) -> dict[int, Tensor]:
    """By layer the (B, length) columns that a compressed cache still holds."""
    alive = {}
    for i, layer in enumerate(cache.layers):
        columns = layer.columns(torch.device("cpu"))
        there = ~layer.padded("filler", columns.device)
        alive[i] = torch.zeros(len(columns), length, dtype=torch.bool).scatter(1, columns, there)
    return alive


@pytest.mark.parametrize("scope", ["visual", "all"])
@torch.no_grad()
def test_prefixkv_second_turn(scope: Any) -> None:
    """What the first turn evicted is masked in the second; the budget is that of both."""
    method = PrefixKV(keep_ratio=0.4, scope=scope)
    first, second = (mini.prompt(1, batch=2, seed=s) for s in (1, 2))
    length = first["input_ids"].shape[1]
    both = torch.ones(2, 2 * length, dtype=torch.long)
    model = vtc.wrap(mini.build(), method)
    cache = cache_left(model(**first, use_cache=True))
    alive = hide(cache, length)
    again = {**second, "attention_mask": both}
    got = model(**again, **giving(model, cache), use_cache=True).logits
    assert cache.get_seq_length() == 2 * length
    after = hide(cache, 2 * length)
    for r in range(2):
        total = sum(int(after[i][r].sum()) for i in range(5))
        text = 2 * (length - mini.PATCHES) * 5
        budget = text + 5 * 2 * round(0.4 * mini.PATCHES)
        assert total == (budget if scope == "visual" else round(0.4 * 5 * 2 * length))
        assert all(bool((after[i][r, :length] <= alive[i][r]).all()) for i in range(5))
    tokens = some_tokens(2, 3)
    held = decode(model, {"input_ids": both}, cache, tokens[:, :1])
    vtc.unwrap(model)
    layers = model.model.language_model.layers
    full = cache_left(model(**first, use_cache=True))
    with masked(layers, alive):
        want = model(**again, **giving(model, full), use_cache=True).logits
    torch.testing.assert_close(got, want, **CLOSE)
    with masked(layers, after):
        want = decode(model, {"input_ids": both}, full, tokens[:, :1])
    torch.testing.assert_close(held, want, **CLOSE)


@torch.no_grad()
def test_prefixkv_pays_while_decoding() -> None:
    """The published form: one slot, 25 before the end of the kept prompt, when one is owed."""
    images, share, steps = [2, 3, 2], 0.6, 12
    inputs, tokens = positioned(mini.prompt(images, pad="left")), some_tokens(3, 12)
    model = vtc.wrap(mini.build(), PrefixKV(keep_ratio=share, scope="all"))
    cache = cache_left(model(**inputs, use_cache=True))
    length = inputs["input_ids"].shape[1]
    starts = [int(m.long().argmax()) for m in inputs["attention_mask"]]
    lists = [kept_columns(cache, r, starts[r]) for r in range(3)]
    prompt = [length - s for s in starts]
    kept = [[len(layer) for layer in row] for row in lists]
    assert [sum(k) for k in kept] == [round(share * 5 * n) for n in prompt]
    assert all(
        0 in layer and n - 1 in layer for row, n in zip(lists, prompt, strict=True) for layer in row
    )
    assert len({k for row in kept for k in row}) > 2
    wants, gots, stock = [], [], mini.build()
    full = cache_left(stock(**inputs, use_cache=True))
    mask, paid = inputs["attention_mask"], 0
    for s in range(steps):
        alive = {}
        for i in range(5):
            alive[i] = torch.zeros(3, length + s, dtype=torch.bool)
            for r in range(3):
                alive[i][r, [c + starts[r] for c in lists[r][i]]] = True
        with masked(stock.model.language_model.layers, alive):
            wants.append(
                decode(
                    stock, {"input_ids": mask, "attention_mask": mask}, full, tokens[:, s : s + 1]
                )
            )
        gots.append(
            decode(model, {"input_ids": mask, "attention_mask": mask}, cache, tokens[:, s : s + 1])
        )
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        for r in range(3):
            for i in range(5):
                held, n, k = lists[r][i], prompt[r], kept[r][i]
                held.append(n + s)
                if len(held) - (n + s + 1) * k / n >= 1 - 1e-9:
                    held.pop(k - 25 if k - 25 >= 1 else len(held) // 2)
                    paid += 1
            assert kept_columns(cache, r, starts[r]) == lists[r]
    assert paid > 20
    torch.testing.assert_close(torch.cat(gots, 1), torch.cat(wants, 1), **CLOSE)


@torch.no_grad()
def test_prefixkv_calibration() -> None:
    model = mini.build()
    samples = [mini.prompt(1, batch=1, seed=s) for s in range(3)]
    found = []
    for sample in samples:
        with vtc.compressing(model, PrefixKV(keep_ratio=0.5)):
            cache = cache_left(model(**sample, use_cache=True))
        found.append([(24 - len(c)) / mini.PATCHES for c in kept_columns(cache, 0, 0)])
    method = PrefixKV.calibrate(model, samples, keep_ratio=0.5)
    assert method.ratios == pytest.approx([sum(f) / 3 for f in zip(*found, strict=True)])
    assert not method.has_budget
    vtc.wrap(model, method)
    cache = cache_left(model(**samples[0], use_cache=True))
    forgot = [24 - len(c) for c in kept_columns(cache, 0, 0)]
    assert forgot == [round(16 * r) for r in method.ratios]
    vtc.unwrap(model)
    with pytest.raises(ValueError, match="3 layers, the model has 5"):
        vtc.wrap(model, PrefixKV(ratios=(0.1, 0.2, 0.3)))(**samples[0], use_cache=True)


def test_prefixkv_parameters() -> None:
    for wrong in (
        dict(scope="text"),
        dict(scope="all", keep_tokens=4),
        dict(start=-1),
        dict(ratios=(0.5,), keep_ratio=0.5),
        dict(ratios=(1.0,)),
    ):
        with pytest.raises(ValueError):
            PrefixKV(**wrong)  # type: ignore[arg-type]


# ---- codecs ----------------------------------------------------------------------------------------


def test_bits_and_trits() -> None:
    g = torch.Generator().manual_seed(0)
    for bits in (1, 2, 4):
        codes = torch.randint(0, 2**bits, (2, 3, 32, 7), generator=g)
        packed = pack_bits(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 4 * bits, 7)
        assert torch.equal(unpack_bits(packed, bits).long(), codes)
    for n in (1, 5, 33, 512):
        codes = torch.randint(0, 3, (2, n), generator=g)
        packed = pack_trits(codes)
        assert packed.shape == (2, -(-n // 5))
        assert torch.equal(unpack_trits(packed, n).long(), codes)
    for d in (1, 2, 7, 8, 12):
        x = torch.randn(3, d, generator=g)
        f = to_spectrum(x)
        assert f.shape == x.shape
        torch.testing.assert_close(from_spectrum(f), x)
        # Real numbers as many as channels, and the full transform in them.
        whole = torch.fft.fft(x, norm="ortho")
        torch.testing.assert_close(f[:, : d // 2 + 1], whole.real[:, : d // 2 + 1])


@pytest.mark.parametrize(
    "gamma, codes, error", [(0.7, [-1, 0, 0, 1, 1, 0], 0.0467), (0.5, [-1, -1, 0, 1, 1, 0], 0.0629)]
)
def test_ternary_golden(gamma: float, codes: list[int], error: float) -> None:
    x = torch.tensor([[-0.9], [-0.3], [0.1], [0.5], [1.0], [0.2]])
    codec = Ternary(gamma)
    y = codec.decode(codec.encode(x), 6, 1)
    assert y.sign()[:, 0].tolist() == codes
    assert (x - y).square().mean().item() == pytest.approx(error, abs=1e-4)


def test_constant_channels() -> None:
    x = torch.tensor([2.5, 0.0, -1.0]).expand(8, 3)
    for codec in (Affine(2), Affine(4), Ternary()):
        torch.testing.assert_close(codec.decode(codec.encode(x), 8, 3), x)
    assert torch.isfinite(MixedKeys().decode(MixedKeys().encode(x), 8, 3)).all()


def test_bits_per_element() -> None:
    """As the documentation says, statistics included."""
    x = torch.randn(2, 2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    for codec, bits in (
        (Affine(2), 3.0),
        (Affine(4), 5.0),
        (Ternary(), 2.1),
        (MixedKeys(), 2.3),
        (MixedKeys(0.25), 1.9),
    ):
        held = sum(t.nbytes for t in codec.encode(x).values()) * 8 / x.numel()
        assert held == pytest.approx(bits, abs=0.05)


def affine_by_hand(x: Tensor, bits: int) -> Tensor:
    """(n, d), channel by channel."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        low, high = x[:, c].min(), x[:, c].max()
        scale, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
        q = ((x[:, c] - zero) / scale).round().clamp(0, 2**bits - 1) if scale > 0 else 0
        out[:, c] = q * scale + zero
    return out


def ternary_by_hand(x: Tensor, gamma: float) -> Tensor:
    out = torch.zeros_like(x)
    for c in range(x.shape[1]):
        large = x[:, c].abs() > gamma * x[:, c].abs().mean()
        scale = x[large, c].abs().mean().half().float()
        out[large, c] = x[large, c].sign() * scale
    return out


def mixed_by_hand(x: Tensor, share: float) -> Tensor:
    """Through the full complex transform, both halves of it."""
    ranges = (x.max(0).values - x.min(0).values).tolist()
    order = sorted(range(len(ranges)), key=lambda c: (-ranges[c], c))
    wide = sorted(order[: round(share * len(order))])
    rest = sorted(set(order) - set(wide))
    out = torch.empty_like(x)
    out[:, wide] = affine_by_hand(x[:, wide], 2)
    if rest:
        f = torch.fft.fft(x[:, rest], norm="ortho")
        parts = []
        for part in (f.real, f.imag):
            part = part.where(part.abs() > 1e-7, 0.0)  # imaginary parts that are zero
            parts.append(part.sign() * part.abs().mean(0).half().float())
        out[:, rest] = torch.fft.ifft(torch.complex(*parts), norm="ortho").real
    return out


def test_mixed_keys_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    for d, share in ((12, 0.5), (12, 0.25), (16, 0.5), (9, 0.4), (8, 0.0), (8, 1.0)):
        x = torch.randn(2, 3, 32, d, generator=g) * torch.rand(d, generator=g)
        codec = MixedKeys(share)
        y = codec.decode(codec.encode(x), 32, d)
        for b in range(2):
            for h in range(3):
                torch.testing.assert_close(y[b, h], mixed_by_hand(x[b, h], share), **CLOSE)


# ---- packed cache layers ---------------------------------------------------------------------------


class Row:
    """One row of one layer by hand: a list of tokens, those packed so far replaced by their codes."""

    def __init__(self, keys: Tensor, values: Tensor, group: int, ask: Packing) -> None:
        self.keys, self.values, self.group, self.ask = keys, values, group, ask  # (H, n, d)
        self.packed = 0

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys], 1)
        self.values = torch.cat([self.values, values], 1)

    def pack(self, due: int, important: set[int] = frozenset(), rank: Any = None) -> None:  # type: ignore[assignment]
        ready = self.keys.shape[1] - self.packed - self.ask.window
        n = ready // self.group * self.group
        if ready < due or n <= 0:
            return
        new = range(self.packed, self.packed + n)
        wanted = [t for t in new if t in important]
        count = -(-len(wanted) // self.group) * self.group
        fill = (
            sorted((t for t in new if t not in important), key=lambda t: (-rank[t], t))
            if rank
            else []
        )
        high = sorted((wanted + fill)[:count] if len(wanted) < count else wanted)
        low = [t for t in new if t not in high]
        for x, low_codec, high_codec in (
            (self.keys, self.ask.keys, self.ask.keys_high),
            (self.values, self.ask.values, self.ask.values_high),
        ):
            parts = (
                [(list(new), low_codec)]
                if high_codec is None
                else [(low, low_codec), (high, high_codec)]
            )
            for tokens, codec in parts:
                for g in range(0, len(tokens), self.group):
                    these = tokens[g : g + self.group]
                    for h in range(x.shape[0]):
                        x[h, these] = by_codec(codec, x[h, these].float()).to(x.dtype)
        self.packed += n


def by_codec(codec: Any, x: Tensor) -> Tensor:
    if isinstance(codec, Affine):
        return affine_by_hand(x, codec.bits)
    return (
        ternary_by_hand(x, codec.gamma)
        if isinstance(codec, Ternary)
        else mixed_by_hand(x, codec.share)
    )


def real_slots(layer: Any, r: int, skip: int) -> tuple[Tensor, Tensor]:
    """Keys and values (H, n, d) of row r in the order of its tokens."""
    columns = layer.columns(torch.device("cpu"))[r]
    there = (~layer.padded("filler", columns.device)[r] & (columns >= skip)).nonzero()[:, 0]
    there = there[columns[there].argsort()]
    keys, values = layer.unpacked()
    return keys[r][:, there], values[r][:, there]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layer_by_hand(dtype: torch.dtype) -> None:
    """Ragged rows, importance, packing in three rounds, reordering; bytes to the last one."""
    g = torch.Generator().manual_seed(0)
    batch, heads, dim, length, group = 3, 2, 12, 75, 8
    skip = [0, 30, 62]
    cache = DynamicCache()

    def fresh(n: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(batch, heads, n, dim, generator=g).to(dtype) for _ in range(2))  # type: ignore[return-value]

    keys, values = fresh(length)
    cache.update(keys, values, 0)
    layer: Any = pruned_layer(cache, 0, batch, torch.device("cpu"))
    valid = torch.arange(length) >= torch.tensor(skip)[:, None]
    rank = torch.randn(batch, length, generator=g)
    important = (rank > 0.6) & valid
    ask = Packing(
        keys=MixedKeys(), values=Ternary(), window=16, due=8, group=group,
        values_high=Affine(2), important=important, rank=rank,
    )  # fmt: skip
    rows = [
        Row(keys[r, :, s:].clone(), values[r, :, s:].clone(), group, ask)
        for r, s in enumerate(skip)
    ]
    before = cache_bytes(cache)
    layer = pack_layer(cache, 0, ask, valid)
    for r, s in enumerate(skip):
        flagged = {int(t) - s for t in important[r].nonzero()[:, 0]}
        rows[r].pack(8, flagged, rank[r, s:].tolist())
    assert [row.packed for row in rows] == [56, 24, 0] == layer.counts.tolist()

    def check(order: list[int]) -> None:
        assert layer.get_seq_length() == length
        for r, source in enumerate(order):
            for got, want in zip(
                real_slots(layer, r, skip[source]),
                (rows[source].keys, rows[source].values),
                strict=True,
            ):
                torch.testing.assert_close(got.float(), want.float(), atol=1e-5, rtol=1e-5)

    check([0, 1, 2])
    held, full = cache_bytes(cache)
    stores = [s for level in layer.levels for s in level.stores]
    exact = sum(t.nbytes for s in stores for t in s.data.values()) + layer.important.nbytes
    assert held == exact + layer.keys.nbytes + layer.values.nbytes < before[0]
    assert full == before[1] == 2 * keys.nbytes
    assert all(t.untyped_storage().nbytes() == t.nbytes for s in stores for t in s.data.values())

    for step in range(40):
        k, v = fresh(1)
        out_keys, _ = cache.update(k, v, 0)
        length += 1
        assert out_keys.shape[2] == layer.physical_length()
        for r in range(batch):
            rows[r].add(k[r], v[r])
            rows[r].pack(16)
        empty = torch.zeros(batch, layer.physical_length(), dtype=torch.bool)
        later = Packing(
            keys=MixedKeys(), values=Ternary(), window=16, due=16, group=group,
            values_high=Affine(2), important=empty, rank=torch.zeros_like(empty).float(),
        )  # fmt: skip
        there = ~layer.padded("filler", torch.device("cpu"))
        there &= layer.columns(torch.device("cpu")) >= torch.tensor(skip)[:, None]
        pack_layer(cache, 0, later, there)
        if step % 13 == 0:
            check([0, 1, 2])
    check([0, 1, 2])
    assert layer.counts.tolist() == [row.packed for row in rows] and min(layer.counts) > 0

    cache.reorder_cache(torch.tensor([2, 0, 0]))
    check([2, 0, 0])
    cache.batch_repeat_interleave(2)
    check([2, 2, 0, 0, 0, 0])
    cache.batch_select_indices(torch.tensor([3, 1]))
    check([0, 2])
    cache.crop(-5)
    length -= 5
    for row in rows:
        row.keys, row.values = row.keys[:, :-5], row.values[:, :-5]
    check([0, 2])
    with pytest.raises(vtc.UnsupportedError, match="packed"):
        cache.crop(-40)
    check([0, 2])
    with pytest.raises(vtc.UnsupportedError, match="evict"):
        layer.evict(vtc.Reduction.identity(2, layer.physical_length()))
    cache.reset()
    assert cache.get_seq_length() == 0 and layer.packed == 0


def packed_cache(length: int, ask: Packing, valid: Tensor | None = None) -> tuple[Any, Tensor]:
    """A cache of one layer, packed, and its keys (2, 2, length, 12), which are the values too."""
    x = torch.randn(2, 2, length, 12, generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    cache.update(x, x, 0)
    pruned_layer(cache, 0, 2, torch.device("cpu"))
    pack_layer(cache, 0, ask, valid)
    return cache, x


def test_layers_with_too_little_to_pack_stay_as_they_are() -> None:
    """Too few slots, or enough of them with too few tokens in any row."""
    ask = Packing(keys=Affine(2), values=Affine(2), window=8, group=8)
    cache, x = packed_cache(15, ask)
    assert torch.equal(cache.layers[0].keys, x) and not hasattr(cache.layers[0], "levels")
    valid = torch.arange(20) >= torch.tensor([[6], [5]])
    cache, x = packed_cache(20, ask, valid)
    (layer,) = cache.layers
    assert layer.packed == 0 and layer.packed_bytes() == 0
    more = torch.randn(2, 2, 1, 12)
    keys, values = cache.update(more, more, 0)
    assert torch.equal(keys, torch.cat([x, more], 2)) and torch.equal(keys, values)
    pack_layer(cache, 0, ask, torch.cat([valid, torch.ones(2, 1, dtype=torch.bool)], 1))
    assert layer.counts.tolist() == [0, 8]


def test_no_token_is_important_unless_the_method_says_so() -> None:
    low = Packing(keys=Affine(2), values=Affine(2), window=8, group=8)
    both = dataclasses.replace(low, keys_high=Affine(4), values_high=Affine(4))
    (want, _), (got, _) = packed_cache(32, low), packed_cache(32, both)
    for a, b in zip(want.layers[0].unpacked(), got.layers[0].unpacked(), strict=True):
        assert torch.equal(a, b)
    assert got.layers[0].packed == 24 and not got.layers[0].important.any()


def test_packed_layers_are_cropped_to_a_length() -> None:
    """As transformers did before 5.13: a positive number is the length to keep."""
    ask = Packing(keys=Affine(2), values=Affine(2), window=8, group=8)
    (one, _), (two, _) = packed_cache(32, ask), packed_cache(32, ask)
    one.layers[0].crop(28)
    two.layers[0].crop(-4)
    for a, b in zip(one.layers[0].unpacked(), two.layers[0].unpacked(), strict=True):
        assert torch.equal(a, b) and a.shape[2] == 28
    with pytest.raises(vtc.UnsupportedError, match="cannot crop 8 tokens: they reach back"):
        one.layers[0].crop(20)


# ---- VidKV and ZipVL's mixed cache -------------------------------------------------------------------


def test_relevance() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    text = torch.tensor([[[1.0, 1.0], [3.0, 0.0], [9.0, 9.0]]])
    valid = torch.tensor([[True, True, False]])
    assert relevance(x, text, valid).tolist() == [[2.0, 1.0]]


def packed_by_hand(
    stock: Any, row: dict[str, Tensor], tokens: Tensor, ask: Packing, due: int,
    important: Callable[[int], tuple[set[int], list[float]]],
) -> tuple[Tensor, list[Row]]:  # fmt: skip
    """Step logits (S, V) of one row on a stock cache whose old tokens are replaced by their codes."""
    cache = cache_left(stock(**row, use_cache=True))
    layers, out = [], []
    for i, layer in enumerate(cache.layers):
        layers.append(Row(layer.keys[0], layer.values[0], ask.group, ask))
        layers[-1].pack(ask.group, *important(i))
    for token in tokens:
        out.append(stock(input_ids=token.view(1, 1), **giving(stock, cache)).logits[0, -1])
        for i, (by_hand_, layer) in enumerate(zip(layers, cache.layers, strict=True)):
            by_hand_.keys, by_hand_.values = layer.keys[0], layer.values[0]
            by_hand_.pack(due, *important(i))
    return torch.stack(out), layers


VIDKV = VidKV(window=8, group=8, protect=0.2)


@pytest.mark.parametrize("pad, attention", CASES[:3])
@torch.no_grad()
def test_vidkv_by_hand(pad: str | None, attention: str) -> None:
    images = ROWS if pad else [1, 1, 1]
    inputs, tokens = positioned(mini.prompt(images, batch=3, pad=pad)), some_tokens(3, 20)
    stock = mini.build(attention=attention)
    plain = decode(stock, inputs, cache_left(stock(**inputs, use_cache=True)), tokens)
    model = vtc.wrap(mini.build(attention=attention), VIDKV)
    cache = cache_left(model(**inputs, use_cache=True))
    report = model.vtc.report()
    held = [
        layer.keys.nbytes + layer.values.nbytes + layer.packed_bytes() for layer in cache.layers
    ]
    assert report.kv_bytes == sum(held)
    length = inputs["input_ids"].shape[1]
    assert report.kv_bytes_full == 5 * 2 * 3 * 2 * 12 * 4 * length
    assert report.kv_bytes < 0.6 * report.kv_bytes_full
    got = decode(model, inputs, cache, tokens)
    ask = Packing(keys=MixedKeys(), values=Ternary(), window=8, group=8, values_high=Affine(2))
    for r, row in enumerate(rows_alone(inputs, images)):
        ids = row["input_ids"][0]
        visual = ids == mini.IMAGE
        x = stock.get_input_embeddings()(ids)
        x[visual] = torch.cat(list(stock.get_image_features(row["pixel_values"]).pooler_output))
        score = x @ x[~visual].mean(0)
        score = score.masked_fill(~visual, -torch.inf).tolist() + [-math.inf] * tokens.shape[1]
        best = sorted(range(len(ids)), key=lambda j: (-score[j], j))[
            : round(0.2 * int(visual.sum()))
        ]
        chosen = (set(best), score)
        want, layers = packed_by_hand(stock, row, tokens[r], ask, 8, lambda i, c=chosen: c)  # type: ignore[misc]
        torch.testing.assert_close(got[r], want, atol=1e-4, rtol=1e-4)
        assert cache.layers[0].counts[r] == layers[0].packed > 16
    assert (got - plain).abs().max() > 0.01, "no teeth"


@torch.no_grad()
def test_zipvl_mixed_by_hand() -> None:
    inputs, tokens = positioned(mini.prompt(ROWS, pad="left")), some_tokens(3, 4)
    tau = 0.6
    model = vtc.wrap(mini.build(), ZipVL(kv="mixed", tau=tau, group=8))
    cache = cache_left(model(**inputs, use_cache=True))
    assert model.vtc.report().kv_bytes < 0.45 * model.vtc.report().kv_bytes_full
    got = decode(model, inputs, cache, tokens)
    stock = mini.build(attention="eager")
    codecs = dict(keys=Affine(2), values=Affine(2), keys_high=Affine(4), values_high=Affine(4))
    ask = Packing(**codecs, window=0, group=8)  # type: ignore[arg-type]
    high = set()
    for r, row in enumerate(rows_alone(inputs, ROWS)):
        sums = [s.tolist() for s in column_sums(stock, row)]

        def important(i: int, sums: Any = sums) -> tuple[set[int], list[float]]:
            a, n = sums[i], len(sums[i])
            rank = [math.inf if j in (0, n - 1) else a[j] / (n - j) for j in range(n)]
            p, mass = 0, 0.0
            for value in sorted(a, reverse=True):
                p, mass = p + 1, mass + value
                if mass >= tau * n:
                    break
            return set(sorted(range(n), key=lambda j: (-rank[j], j))[:p]), rank

        want, layers = packed_by_hand(stock, row, tokens[r], ask, 100, important)
        torch.testing.assert_close(got[r], want, atol=1e-4, rtol=1e-4)
        assert [layer.counts[r] for layer in cache.layers] == [layer.packed for layer in layers]
        high |= {int(layer.important[r].sum()) for layer in cache.layers}
    assert len(high) > 1
    long = model.generate(
        **inputs, max_new_tokens=120, do_sample=False, return_dict_in_generate=True
    )
    counts = cache_left(long).layers[2].counts
    assert (counts > torch.tensor([layer.shape[0] for layer in inputs["attention_mask"]])).all()


@torch.no_grad()
def test_vidkv_after_pruning() -> None:
    """The codes of what a method in the LLM left; generation in every way runs."""
    inputs, tokens = mini.prompt(2, batch=1), some_tokens(1, 2)
    fastv, vidkv = vtc.methods()["fastv"](keep_tokens=8), VidKV(window=8, group=8, protect=0)
    model = vtc.wrap(mini.build(), vtc.chain(fastv, vidkv))
    cache = cache_left(model(**inputs, use_cache=True))
    got = decode(model, inputs, cache, tokens)
    assert [layer.counts.item() for layer in cache.layers] == [32, 32, 16, 16, 16]
    vtc.unwrap(model)
    vtc.wrap(model, fastv)
    cache = cache_left(model(**inputs, use_cache=True))
    ask = Packing(keys=MixedKeys(), values=Ternary(), window=8, group=8)
    for layer in cache.layers:
        Row(layer.keys[0], layer.values[0], 8, ask).pack(8)
    torch.testing.assert_close(got, decode(model, inputs, cache, tokens), atol=1e-4, rtol=1e-4)
    vtc.unwrap(model)


@torch.no_grad()
def test_vidkv_protects_what_is_left_first() -> None:
    """No token that FastV dropped is important while a packed one that stays is not."""
    chain = vtc.chain(FastV(keep_tokens=8), VidKV(window=8, group=8, protect=0.5))
    model, teeth = vtc.wrap(mini.build(), chain), 0
    for seed in range(6):
        inputs = mini.prompt(ROWS, pad="left", seed=seed)
        cache = cache_left(model(**inputs, use_cache=True))
        visual, last = inputs["input_ids"] == mini.IMAGE, cache.layers[-1]
        there = ~last.padded("filler", visual.device)
        left = torch.zeros_like(visual).scatter(1, last.columns(visual.device), there) & visual
        for layer in cache.layers[:2]:
            columns = layer.columns(visual.device)[:, : layer.packed]
            packed = torch.arange(layer.packed) < layer.counts[:, None]
            image, stays = (x.gather(1, columns) & packed for x in (visual, left))
            for r in range(len(visual)):
                high = layer.important[r]
                gone = image[r] & ~stays[r]
                assert not (high & gone).any() or high[stays[r]].all()
                teeth += int(high.any() and gone.any())
    assert teeth


@pytest.mark.parametrize(
    "method",
    [VIDKV, ZipVL(kv="mixed", group=8), ZipVL(tau=0.7), HeuristicMoD(), PrefixKV(scope="all")],
    ids=str,
)
@torch.no_grad()
def test_every_way_of_calling(method: vtc.Method) -> None:
    """Beams and sampling run; a second image and a text turn go on from what is packed."""
    model = vtc.wrap(mini.build(), vtc.chain("random", method))
    inputs = mini.prompt(ROWS, pad="left")
    for how in (dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)):
        out = model.generate(**inputs, **how, max_new_tokens=20)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 20
    vtc.unwrap(model)
    vtc.wrap(model, method)
    one, two = mini.prompt(1, batch=2, seed=1), mini.prompt(1, batch=2, seed=2)
    cache = cache_left(model(**one, use_cache=True))
    seen = one["input_ids"].shape[1]
    for more in (two, {"input_ids": some_tokens(2, 4)}, {"input_ids": some_tokens(2, 1)}):
        seen += more["input_ids"].shape[1]
        more = {**more, "attention_mask": torch.ones(2, seen, dtype=torch.long)}
        out = model(**more, **giving(model, cache), use_cache=True)
        assert torch.isfinite(out.logits).all()
        assert cache.get_seq_length() == seen


@torch.no_grad()
def test_second_turn_reads_the_codes() -> None:
    """The second prompt attends to what the stock model would see if its cache held the codes."""
    method = VidKV(window=8, group=8, protect=0)
    one, two = mini.prompt(1, batch=1, seed=1), mini.prompt(1, batch=1, seed=2)
    two["attention_mask"] = torch.ones(1, 48, dtype=torch.long)
    model = vtc.wrap(mini.build(), method)
    cache = cache_left(model(**one, use_cache=True))
    got = model(**two, **giving(model, cache), use_cache=True).logits
    assert cache.layers[0].counts.item() == 40
    vtc.unwrap(model)
    cache = cache_left(model(**one, use_cache=True))
    ask = Packing(keys=MixedKeys(), values=Ternary(), window=8, group=8)
    for layer in cache.layers:
        Row(layer.keys[0], layer.values[0], 8, ask).pack(8)
    want = model(**two, **giving(model, cache), use_cache=True).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_nothing_to_pack_is_stock() -> None:
    """Short prompts stay in the window: no bit changes."""
    model, inputs = mini.build(), mini.prompt(ROWS, pad="left")
    stock = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    vtc.wrap(model, "vidkv")
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), stock)


def test_vidkv_parameters() -> None:
    assert not VidKV().has_budget and VidKV(protect=0).stages == {"cache"}
    VidKV(keep_ratio=1.0)
    for wrong in (dict(keep_ratio=0.5), dict(keep_tokens=64)):
        with pytest.raises(ValueError, match="saves bits"):
            VidKV(**wrong)  # type: ignore[arg-type]
    for wrong in (
        dict(key_share=2),
        dict(protect=-1),
        dict(gamma=1.5),
        dict(group=10),
        dict(window=-1),
    ):
        with pytest.raises(ValueError):
            VidKV(**wrong)  # type: ignore[arg-type]
