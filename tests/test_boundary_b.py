# SPDX-License-Identifier: Apache-2.0
"""ToDRE, VScan and TOPS: one selection in front of the LLM and one inside it."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import mini_anyres
import mini_llava as mini
import pytest
import torch
from torch import Tensor

import vtc
from vtc.benchmarks.oracle import compare
from vtc.cost import llm_flops
from vtc.methods._common import unit
from vtc.methods._stages import entering
from vtc.methods.fastv import FastV
from vtc.methods.todre import ToDRE, max_sum_order
from vtc.methods.tops import TOPS, greedy_set
from vtc.methods.uniform import Uniform
from vtc.methods.vscan import VScan, best_of_windows, windows
from vtc.transformers_contract import cache_left
from vtc.views import FeaturesView, Projections

ANGLES = torch.tensor([0.0, 10, 25, 90, 100, 180, 205, 300]).deg2rad()
V8 = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)[None]
LAST = 5  # text tokens behind the image in the prompts of mini_llava


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def random_tokens(batch: int, n: int, seed: int = 0, width: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, width, generator=g), torch.rand(batch, n, generator=g)


def features_view(
    batch: int = 2, grid: tuple[int, int] = (6, 8), seed: int = 0, depth: int = 6, cls: bool = True
) -> FeaturesView:
    total, heads = grid[0] * grid[1], 4
    g = torch.Generator().manual_seed(seed)

    def layer() -> Projections:
        q, k = torch.randn(2, batch, heads, total + cls, 8, generator=g)
        return Projections(lambda rows: q[:, :, rows], lambda: k, 8**-0.5)

    return FeaturesView(
        features=torch.randn(batch, total, 32, generator=g),
        size=torch.ones(batch, total),
        index=torch.arange(total).expand(batch, total),
        total=total,
        grid=grid,
        prefix=int(cls),
        has_cls=cls,
        projector=lambda x: x[..., :16] * 2 + 1,
        layers={i: layer() for i in range(depth)},
        depth=depth,
    )


# ---- what the stock model says, with eager attention maps --------------------------------------


@functools.cache
def stock(pad: str | None = None, images: tuple[int, ...] = (1, 1)) -> dict[str, Any]:
    """Maps and features of the uncompressed mini LLaVA, on inputs with rows of one image each."""
    model = mini.build(attention="eager")
    inputs = mini.prompt(list(images), pad=pad)
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    tower = model.model.vision_tower(
        inputs["pixel_values"], output_attentions=True, output_hidden_states=True
    )
    features = tower.hidden_states[-2][:, 1:]
    return {
        "inputs": inputs,
        "llm": out.attentions,
        "hidden": out.hidden_states,
        "cls": [a[:, :, 0, 1:].mean(1) for a in tower.attentions],
        "features": features,
        "projected": model.model.multi_modal_projector(features),
        "visual": inputs["input_ids"] == mini.IMAGE,
    }


def kept_by(method: Any, pad: str | None = None, images: tuple[int, ...] = (1, 1)) -> list:
    model = mini.build()
    vtc.wrap(model, method)
    model(**stock(pad, images)["inputs"])
    return [k.tolist() for k in model.vtc.report().kept]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() @ b.double()) / (a.double().norm() * b.double().norm()))


# ---- ToDRE, stage 1 ----------------------------------------------------------------------------


def naive_max_sum(x: Tensor, pivot: int, k: int) -> list[int]:
    chosen = [pivot]
    while len(chosen) < k:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: sum(cosine(x[i], x[c]) for c in chosen)))
    return chosen


def test_todre_worked_example() -> None:
    """Angles 0 and 180 cancel, so the third pick is a tie that only rounding breaks; a degree does.

    DivPrune takes 7, 4, 6, 2 of the same tokens.
    """
    pivot = torch.tensor([0])
    order = max_sum_order(V8, pivot, 4)[0].tolist()
    assert order[:2] == [0, 5]
    tie = V8[0] @ (V8[0, 0] + V8[0, 5])
    assert tie.abs().max() < 1e-6
    angles = torch.tensor([0.0, 10, 25, 90, 100, 179, 205, 300]).deg2rad()
    x = torch.stack([angles.cos(), angles.sin()], 1)[None]
    assert max_sum_order(x, pivot, 4)[0].tolist() == [0, 5, 7, 4]


def test_todre_is_the_naive_loop() -> None:
    x, _ = random_tokens(3, 23)
    pivot = torch.tensor([4, 0, 22])
    for k in (1, 2, 7, 23):
        order = max_sum_order(x, pivot, k)
        for row in range(3):
            assert order[row].tolist() == naive_max_sum(x[row], int(pivot[row]), k)


def test_todre_equal_features_stay_in_order() -> None:
    x = torch.ones(2, 6, 3)
    x[1] = 0  # no direction at all
    assert max_sum_order(x, torch.tensor([3, 0]), 4).tolist() == [[3, 0, 1, 2], [0, 1, 2, 3]]


def test_todre_takes_its_pivot_from_the_last_block() -> None:
    facts = stock()
    for k in (1, 4, 6):
        want = [
            sorted(naive_max_sum(x, int(facts["cls"][-1][i].argmax()), k))
            for i, x in enumerate(facts["projected"])
        ]
        assert kept_by(ToDRE(keep_tokens=k)) == want
    # The pivot alone tells the last block from the others.
    assert any(int(a.argmax()) != want[0][0] for a in (facts["cls"][0][0], facts["cls"][-2][0]))


def test_todre_random_pivot() -> None:
    v = features_view(batch=3, cls=False)
    method = ToDRE(keep_tokens=5, pivot="random")
    assert method.needs == frozenset() and method.captures(6) == ()
    pivot = method.first(v)
    assert len(set(pivot.tolist())) == 1  # batch mates do not matter
    pivots = {int(ToDRE(pivot="random", seed=s).first(v)[0]) for s in range(40)}
    assert len(pivots) > 15 and max(pivots) < v.count
    order = max_sum_order(v.projected, pivot, 5).sort(1).values
    assert torch.equal(method.on_features(v).keep, order)  # type: ignore[union-attr]
    # The place in the grid counts, not the place in what an earlier method has left.
    keep = torch.arange(1, v.count, 2)
    part = replace(v, features=v.features[:, keep], index=v.index[:, keep], size=v.size[:, keep])
    left = int(method.first(part)[0])
    full = int(pivot[0])
    assert (full not in keep) or int(keep[left]) == full
    assert ToDRE(keep_ratio=0.3, pivot="random").stages == {"features"}
    model = mini.build("siglip")
    vtc.wrap(model, "todre", keep_tokens=4, pivot="random")
    model(**mini.prompt())
    assert model.vtc.report().final_tokens == 4


def test_todre_budget_or_threshold() -> None:
    off, on = frozenset({"features"}), frozenset({"features", "decoder"})
    for method, tau, stages in (
        (ToDRE(), 0.1, on),
        (ToDRE(tau=0.0), 0.0, off),
        (ToDRE(keep_ratio=0.3), 0.0, off),
        (ToDRE(keep_tokens=3), 0.0, off),
        (ToDRE(keep_tokens=3, tau=0.2), 0.2, on),
        (ToDRE.paper("llava-next", 288), 0.1, on),
    ):
        assert method.threshold == tau and method.stages == stages
        assert method.has_budget == (tau == 0)
    assert ToDRE.paper("llava-next", 720).budget(2880) == 720
    assert ToDRE.paper("llava-next", 288).budget(2880) == 288
    assert [ToDRE().decoder_layers(d) for d in (32, 24, 40, 8, 5)] == [
        (27,),
        (20,),
        (34,),
        (6,),
        (3,),
    ]


def test_todre_pools_the_crops_of_an_image() -> None:
    """One pool for thumbnail and crops, and a pivot from the thumbnail."""
    model = mini_anyres.build("next", seed=1)
    inputs = mini_anyres.prompt([[mini_anyres.SQUARE]])
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Spy(ToDRE):
        def on_features(self, v: FeaturesView) -> Any:
            done = super().on_features(v)
            assert v.count == 80 and v.crops is not None
            assert [i for i, crop in enumerate(v.crops.crop.tolist()) if crop == 0] == [*range(16)]
            seen.append((v.cls_attention(-1).mean(1)[0], v.projected[0], done.keep[0]))
            return done

    for k in (1, 2, 6):
        vtc.wrap(model, Spy(keep_tokens=k))
        model(**inputs)
        assert model.vtc.report().final_tokens == k
        vtc.unwrap(model)
        scores, x, keep = seen.pop()
        assert not seen
        pivot = int(scores[:16].argmax())
        assert int(scores.argmax()) != pivot, "the thumbnail wins anyway: no teeth"
        assert keep.tolist() == sorted(naive_max_sum(x, pivot, k))


@pytest.mark.parametrize("name", ["todre", "vscan", "tops"])
def test_images_in_crops(name: str) -> None:
    model = mini_anyres.build("next")
    sizes = [[mini_anyres.WIDE], [mini_anyres.TINY, mini_anyres.SQUARE]]
    inputs = mini_anyres.prompt(sizes)
    for k in (2, 9):
        with vtc.compressing(model, name, keep_tokens=k) as session:
            model(**inputs)
            report = session.report()
        assert [len(kept) for kept in report.kept] == [k, k, k] or name != "todre"
        assert sum(len(kept) for kept in report.kept) == 3 * k
        assert report.final_tokens == 1.5 * k == report.asked


# ---- ToDRE, stage 2 ----------------------------------------------------------------------------


def naive_share(facts: dict[str, Any], row: int, layer: int = 3) -> float:
    """Attention that the text behind the last image pays to visual tokens, of all it pays."""
    visual = facts["visual"][row]
    real = facts["inputs"]["attention_mask"][row].bool()
    last = int(visual.nonzero().max())
    text = [t for t in range(last + 1, len(visual)) if real[t]]
    paid = total = 0.0
    for head in facts["llm"][layer][row]:
        for t in text:
            paid += float(head[t][visual].sum())
            total += float(head[t].sum())
    return paid / total


def between(facts: dict[str, Any], rows: int) -> tuple[list[float], float]:
    """The share of each row, and a threshold in the middle of the widest gap."""
    shares = [naive_share(facts, r) for r in range(rows)]
    order = sorted(shares)
    gap, tau = max((b - a, (a + b) / 2) for a, b in pairwise(order))
    assert gap > 1e-3, "the rows look alike: choose other inputs"
    return shares, tau


CASES: dict[str, tuple[str | None, tuple[int, ...]]] = {
    "batch": (None, (1, 1)),
    "left": ("left", (1, 2, 1)),
    "right": ("right", (1, 1, 2)),
}


def prefill_and_steps(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, list]:
    out = model(**inputs, use_cache=True)
    lengths = [layer.keys.shape[2] for layer in cache_left(out).layers]
    steps = None
    if bool(inputs["attention_mask"][:, -1].all()):
        made = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        steps = torch.stack(made.logits, 1)
    return out.logits, steps, lengths


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_todre_drops_the_rows_that_look_away(name: str, attention: str) -> None:
    """One row loses every visual token, another keeps all; dropped is masked, also decoding."""
    pad, images = CASES[name]
    facts = stock(pad, images)
    shares, tau = between(facts, len(images))
    model = mini.build(attention=attention)
    vtc.wrap(model, "todre", tau=tau, keep_ratio=1.0)
    (got, steps, lengths), (want, want_steps, _), alive = compare(
        model, lambda: prefill_and_steps(model, facts["inputs"])
    )
    visual = facts["visual"]
    stays = [share >= tau for share in shares]
    assert True in stays and False in stays
    for r, stay in enumerate(stays):
        assert (alive[3][r] & visual[r]).sum() == images[r] * mini.PATCHES
        assert (alive[4][r] & visual[r]).sum() == images[r] * mini.PATCHES * stay
    real = facts["inputs"]["attention_mask"].bool() & alive[4]
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
    if steps is not None:
        torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    entered = real.sum(1).max().item()
    assert entered <= lengths[4] <= alive[4].sum(1).max().item()
    assert lengths[:4] == [visual.shape[1]] * 4
    model(**facts["inputs"])
    report = model.vtc.report()
    flat = [stay for stay, n in zip(stays, images, strict=True) for _ in range(n)]
    assert [len(k) for k in report.kept] == [mini.PATCHES * stay for stay in flat]
    assert report.asked is None and "asked" not in str(report)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("batch", [1, 2])
def test_todre_may_drop_everything(positions: str, batch: int) -> None:
    inputs = mini.prompt(batch=batch)
    model = mini.build()
    # 1.0 is above any share: text sees itself.
    vtc.wrap(model, ToDRE(tau=1.0, keep_tokens=6, positions=positions))
    if positions == "original":
        (got, steps, lengths), (want, want_steps, _), alive = compare(
            model, lambda: prefill_and_steps(model, inputs)
        )
        rows = alive[4]
        torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    else:
        _, _, lengths = prefill_and_steps(model, inputs)
    assert lengths == [14, 14, 14, 14, 8]
    model(**inputs)
    report = model.vtc.report()
    assert report.final_tokens == 0 and report.tokens_per_layer == [6, 6, 6, 6, 0]
    assert [len(k) for k in report.kept] == [0] * batch
    assert report.kv_bytes < report.kv_bytes_full  # type: ignore[operator]


def test_todre_in_front_of_methods_that_find_nothing_left() -> None:
    model = mini.build()
    both = (FastV(k=4, keep_ratio=0.5), VScan(keep_tokens=2), TOPS(keep_tokens=2))
    for later in both:
        # k=4: FastV acts at the same place, right behind; the others before it.
        with vtc.compressing(model, vtc.chain(ToDRE(tau=1.0, keep_tokens=12), later)) as session:
            model.generate(**mini.prompt(), max_new_tokens=3, do_sample=False)
            assert session.report().final_tokens == 0


def test_todre_row_without_an_image() -> None:
    inputs = mini.prompt([1, 0, 1], pad="left")
    model = mini.build()
    vtc.wrap(model, ToDRE(tau=1.0, keep_tokens=6))
    together = model(**inputs).logits
    assert model.vtc.report().final_tokens == 0
    real = inputs["attention_mask"][1].bool()
    vtc.unwrap(model)
    alone = model(input_ids=inputs["input_ids"][1:2, real]).logits
    torch.testing.assert_close(together[1][real], alone[0], atol=1e-5, rtol=1e-5)


def test_todre_decision_does_not_depend_on_batch_mates() -> None:
    for pad, images in CASES.values():
        facts = stock(pad, images)
        _, tau = between(facts, len(images))
        inputs, first = facts["inputs"], 0
        model = mini.build()
        vtc.wrap(model, ToDRE(tau=tau, keep_tokens=9))
        together = model(**inputs).logits
        for r, n in enumerate(images):
            real = inputs["attention_mask"][r].bool()
            alone = model(
                input_ids=inputs["input_ids"][r : r + 1, real],
                attention_mask=inputs["attention_mask"][r : r + 1, real],
                pixel_values=inputs["pixel_values"][first : first + n],
            ).logits
            first += n
            torch.testing.assert_close(together[r][real], alone[0], atol=1e-5, rtol=1e-5)


# ---- VScan -------------------------------------------------------------------------------------


def test_vscan_windows() -> None:
    index = torch.arange(576)[None]
    window = windows(index, (24, 24), 6)
    assert window[0].bincount().tolist() == [36] * 16
    assert window[0].reshape(24, 24)[5, 5] == 0 and window[0].reshape(24, 24)[6, 5] == 4
    assert window[0].reshape(24, 24)[0, 6] == 1 and window[0, -1] == 15
    sizes = windows(torch.arange(256)[None], (16, 16), 6)[0].bincount()
    assert len(sizes) == 9 and set(sizes.tolist()) == {25, 30, 36}
    assert windows(torch.arange(16)[None], (4, 4), 6).max() == 0
    assert windows(torch.arange(4)[None], (2, 2), 6).max() == 0


def test_vscan_windows_give_equally() -> None:
    scores = torch.rand(3, 576, generator=torch.Generator().manual_seed(1))
    window = windows(torch.arange(576).expand(3, -1), (24, 24), 6)
    for k in (48, 50, 96):
        chosen = best_of_windows(scores, window, k)
        for row in range(3):
            taken = window[row, chosen[row]].bincount(minlength=16)
            assert taken.min() == k // 16 and taken.max() == -(-k // 16)
            third = []  # the best of what every window offers next
            for w in range(16):
                inside = [i for i in range(576) if window[row, i] == w]
                ranked = sorted(inside, key=lambda i: -float(scores[row, i]))
                assert set(ranked[: k // 16]) <= set(chosen[row].tolist())
                third.append((float(scores[row, ranked[k // 16]]), ranked[k // 16]))
            extra = {i for _, i in sorted(third, reverse=True)[: k % 16]}
            assert extra <= set(chosen[row].tolist())


def test_vscan_windows_that_are_used_up() -> None:
    window = torch.tensor([[0, 0, 0, 0, 0, 2]])  # window 1 is empty, window 2 has one token
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.3, 0.2, 0.01]])
    assert best_of_windows(scores, window, 4).tolist() == [[1, 5, 2, 3]]


def naive_vscan(v: Any, row: int, k: int, side: int, early: Tensor, late: Tensor) -> dict:
    """Token -> the token it goes to."""
    rows, columns = v.grid
    down, across = max(1, round(rows / side)), max(1, round(columns / side))
    cells: dict[tuple[int, int], list[int]] = {}
    for i in range(v.count):
        r, c = divmod(int(v.index[row, i]), columns)
        cells.setdefault((r * down // rows, c * across // columns), []).append(i)
    local: list[int] = []
    for turn in range(v.count):
        offers = []
        for inside in cells.values():
            ranked = sorted(inside, key=lambda i: (-float(early[row, i]), i))
            offers += ranked[turn : turn + 1]
        offers.sort(key=lambda i: (-float(early[row, i]), i))
        local += offers[: k // 2 - len(local)]
    others = [i for i in range(v.count) if i not in local]
    others.sort(key=lambda i: (-float(late[row, i]), i))
    kept = sorted(local + others[: k - len(local)])
    x = v.features[row]
    return {
        i: i if i in kept else max(kept, key=lambda j: (cosine(x[i], x[j]), -j))
        for i in range(v.count)
    }


@pytest.mark.parametrize("k", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("side", [2, 3, 6])
def test_vscan_is_the_naive_loop(k: int, side: int) -> None:
    v = features_view()
    method = VScan(keep_tokens=k, window=side)
    done = method.on_features(v)
    assert done is not None and done.count == 3 * k
    assert method.captures(6) == (1, 4)
    early, late = v.cls_attention(1).mean(1), v.cls_attention(4).mean(1)
    for row in range(2):
        want = naive_vscan(v, row, 3 * k, side, early, late)
        got = done.keep[row][done.group[row]].tolist()
        assert got == [want[i] for i in range(v.count)]


def test_vscan_behind_another_method() -> None:
    v = features_view()
    keep = torch.tensor([0, 3, 4, 9, 17, 18, 22, 30, 31, 40, 44, 47])
    part = replace(v, features=v.features[:, keep], index=v.index[:, keep], size=v.size[:, keep])
    early = torch.rand(2, 12, generator=torch.Generator().manual_seed(3))
    late = early.flip(1)
    part.cls_attention = lambda layer: (early if layer == 1 else late)[:, None]  # type: ignore
    done = VScan(keep_tokens=2, window=3).on_features(part)
    assert done is not None
    for row in range(2):
        want = naive_vscan(part, row, 6, 3, early, late)
        assert done.keep[row][done.group[row]].tolist() == [want[i] for i in range(12)]
    assert VScan(keep_tokens=4).on_features(part) is None  # 12 may enter and 12 are there


def test_vscan_schedule_and_published_settings() -> None:
    for mean in (64, 128, 192):
        method = VScan.paper("llava-1.5", mean)
        final = method.budget(576)
        start = entering(final, 576, method.llm_share)
        assert (final, start) == (mean // 2, 3 * mean // 2)
        (layer,) = method.decoder_layers(32)
        counts = [start] * (layer + 1) + [final] * (31 - layer)
        assert sum(counts) / 32 == mean
        assert llm_flops(counts, 4096, 11008) / llm_flops([576] * 32, 4096, 11008) < mean / 576
    assert VScan().captures(24) == (5, 22)
    assert VScan().decoder_layers(5) == (2,) and VScan().decoder_layers(24) == (11,)
    assert entering(100, 120, 1 / 3) == 120 and entering(7, 120, 1.0) == 7
    assert VScan().budget(576) == 64


def test_vscan_on_llava() -> None:
    """Both stages: what is merged where, and what the last prompt token leaves in the LLM."""
    facts = stock()
    v = features_view(grid=(4, 4))
    v.features = facts["features"]
    model = mini.build()
    vtc.wrap(model, "vscan", keep_tokens=3)
    model(**facts["inputs"])
    report, done = model.vtc.report(), model.vtc.vision.state.reduction
    assert report.tokens_per_layer == [9, 9, 9, 3, 3] and report.asked == 3
    merged = mini.build(attention="eager")
    embeds = merged.get_input_embeddings()(facts["inputs"]["input_ids"])
    before = [i for i in range(embeds.shape[1]) if not facts["visual"][0, i]]
    for row in range(2):
        want = naive_vscan(v, row, 9, 6, facts["cls"][0], facts["cls"][2])
        assert done.keep[row][done.group[row]].tolist() == [want[i] for i in range(16)]
        # The LLM on the merged tokens, with a stock model at the original positions.
        kept = sorted(set(want.values()))
        pooled = [facts["features"][row, [i for i in want if want[i] == j]].mean(0) for j in kept]
        tokens = merged.model.multi_modal_projector(torch.stack(pooled))
        places = sorted([*before[:3], *(3 + j for j in kept), *before[3:]])
        x = embeds[row, places].clone()
        x[3:12] = tokens
        maps = merged.model.language_model(
            inputs_embeds=x[None], position_ids=torch.tensor([places]), output_attentions=True
        ).attentions[2]
        scores = maps[0, :, -1, 3:12].mean(0)
        best = sorted(scores.argsort(descending=True)[:3].tolist())
        assert report.kept[row].tolist() == [kept[i] for i in best]


# ---- TOPS --------------------------------------------------------------------------------------


def naive_tops(x: Tensor, r: Tensor, k: int, cover: float, novel: float) -> list[int]:
    n = len(x)
    sim = [[cosine(x[i], x[j]) for j in range(n)] for i in range(n)]

    def scaled(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(a - low) / max(high - low, 1e-6) for a in values]

    relevance = scaled(r.tolist())
    chosen = [max(range(n), key=lambda i: (relevance[i], -i))]
    while len(chosen) < k:
        best = [max(sim[j][s] for s in chosen) for j in range(n)]
        c = [
            sum(max(0.0, sim[i][j] - best[j]) for j in range(n) if j not in chosen)
            for i in range(n)
        ]
        d = [1 - best[i] for i in range(n)]
        for i in chosen:
            assert c[i] < 1e-9 and d[i] < 1e-9
        c, d = scaled(c), scaled(d)
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (relevance[i] + cover * c[i] + novel * d[i], -i)))
    return chosen


def test_tops_by_hand() -> None:
    """Three directions: 0, 1, 2 alike; 3, 4 alike; 5 alone."""
    x = torch.eye(3)[[0, 0, 0, 1, 1, 2]][None]
    r = torch.tensor([[0.5, 1.0, 0.9, 0.2, 0.3, 0.0]])
    # Seed 1. Then c = (0 0 0 2 2 1) / 2, d = (0 0 0 1 1 1): 3 has .2 + 1 + 1, 4 .3 + 1 + 1,
    # 5 0 + .5 + 1. Then only 5 is new: c = d = 1 there: 2 against .9 of token 2.
    assert greedy_set(x, r, 5, 1, 1)[0].tolist() == [1, 4, 5, 2, 0]
    assert greedy_set(x, r, 3, 0, 0)[0].tolist() == [1, 2, 0]  # relevance alone
    assert greedy_set(x, r, 3, 0, 0.65)[0].tolist() == [1, 4, 2]
    assert greedy_set(x, r, 3, 0.65, 0)[0].tolist() == [1, 4, 2]
    assert greedy_set(x, torch.zeros_like(r), 3, 1, 1)[0].tolist() == [0, 3, 5]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.0), (0.0, 0.7)])
def test_tops_is_the_naive_loop(weights: tuple[float, float]) -> None:
    x, r = random_tokens(3, 19)
    for k in (1, 2, 8, 19):
        order = greedy_set(x, r, k, *weights)
        for row in range(3):
            assert order[row].tolist() == naive_tops(x[row], r[row], k, *weights)


def test_tops_ragged_rows() -> None:
    x, r = random_tokens(4, 19, seed=5)
    n = torch.tensor([19, 7, 12, 3])
    valid = torch.arange(19) < n[:, None]
    # What stands in the padding must not matter: noise, or what would cover all the others best.
    middle = (unit(x) * valid[..., None]).sum(1, keepdim=True)
    for padding in (torch.full_like(x, 100.0), middle.expand_as(x)):
        loud = x.where(valid[..., None], padding)
        order = greedy_set(loud, r.where(valid, 9.0), 7, 1, 1, valid)
        for row in range(4):
            m = int(min(n[row], 7))
            want = naive_tops(x[row, : n[row]], r[row, : n[row]], m, 1, 1)
            assert order[row, :m].tolist() == want
    assert torch.equal(order[:3], greedy_set(x, r, 7, 1, 1, valid)[:3])


def test_tops_padding_does_not_set_the_scale() -> None:
    """c is 2 for token 1 and 1 for token 3; 1.25 (2 - 1) / 2 > 0.6, but not with 2.12 for 2."""
    basis = torch.eye(3)
    x = torch.stack([basis[0], basis[1], basis[1], basis[2], basis[1] + basis[2]])[None]
    r = torch.tensor([[1.0, 0.0, 0.0, 0.6, 0.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert greedy_set(x[:, :4], r[:, :4], 2, 1.25, 1.0)[0].tolist() == [0, 1]
    assert greedy_set(x, r, 2, 1.25, 1.0, valid)[0].tolist() == [0, 1]
    assert greedy_set(x, r, 2, 1.15, 1.0, valid)[0].tolist() == [0, 3]


def test_tops_on_llava() -> None:
    """In front of the LLM by the CLS row, inside it by the prompt's rows; alone and both."""
    facts = stock()
    r = facts["cls"][-2]
    for k in (1, 4, 7):
        want = [sorted(naive_tops(facts["projected"][i], r[i], k, 1, 1)) for i in range(2)]
        assert kept_by(TOPS(keep_tokens=k, llm_share=1.0)) == want
    assert TOPS().captures(4) == (2,)


@pytest.mark.parametrize("name", CASES)
def test_tops_inside_the_llm(name: str) -> None:
    pad, images = CASES[name]
    facts = stock(pad, images)
    k = 9  # 18 may enter, so all 16 do
    got, image = kept_by(TOPS(keep_tokens=k, cover=0.5), pad, images), 0
    for row, n in enumerate(images):
        visual = facts["visual"][row]
        places = visual.nonzero()[:, 0]
        real = facts["inputs"]["attention_mask"][row].bool()
        text = [t for t in range(int(places[-1]) + 1, len(visual)) if real[t]]
        r = facts["llm"][2][row][:, text][:, :, places].mean((0, 1))
        order = naive_tops(facts["hidden"][3][row, places], r, k * n, 0.5, 1.0)
        mine = [i + 16 * j for j in range(n) for i in got[image + j]]
        image += n
        assert mine == sorted(order)


def test_tops_both_places() -> None:
    model = mini.build()
    vtc.wrap(model, TOPS(keep_tokens=4))
    model(**mini.prompt())
    report = model.vtc.report()
    assert report.tokens_per_layer == [8, 8, 8, 4, 4] and report.final_tokens == report.asked == 4
    assert len(model.vtc.vision.state.reduction.keep[0]) == 8
    assert TOPS(keep_ratio=0.25).decoder_layers(32) == (15,)


def test_tops_without_cls() -> None:
    method = TOPS(keep_tokens=3, saliency="received")
    assert "cls" not in method.needs
    v = features_view(cls=False)
    r = v.attention_received(-2)
    done = method.on_features(v)
    for row in range(2):
        assert done.keep[row].tolist() == sorted(  # type: ignore[union-attr]
            naive_tops(v.projected[row], r[row], 6, 1, 1)
        )
    model = mini.build("siglip")
    vtc.wrap(model, method)
    model(**mini.prompt())
    assert model.vtc.report().final_tokens == 3


# ---- all three ---------------------------------------------------------------------------------

THREE: dict[str, Any] = {
    "todre": ToDRE,
    "todre random": lambda **k: ToDRE(pivot="random", **k),
    "vscan": VScan,
    "vscan one stage": lambda **k: VScan(llm_share=1.0, **k),
    "tops": TOPS,
    "tops received": lambda **k: TOPS(saliency="received", **k),
}


@pytest.mark.parametrize("name", THREE)
def test_budgets_in_front_of_the_llm(name: str) -> None:
    for k in (1, 2, 3, 7, 15, 16, 23, 24, 47):
        method = THREE[name](keep_tokens=k)
        want = min(48, entering(k, 48, getattr(method, "llm_share", 1.0)))
        done = method.on_features(features_view())
        assert method.budget(48) == k
        if want == 48:
            assert done is None
            continue
        assert done.keep.shape == (2, want) and done.valid is None
        assert (done.keep.diff(dim=1) > 0).all()
        assert bool((done.group >= 0).all()) == method.merges
    assert THREE[name](keep_ratio=1.0).on_features(features_view()) is None
    assert THREE[name](keep_tokens=480).on_features(features_view()) is None


@pytest.mark.parametrize("name", THREE)
def test_a_row_alone_in_front_of_the_llm(name: str) -> None:
    method = THREE[name](keep_tokens=5)
    v = features_view(batch=3)

    def alone(p: Projections) -> Projections:
        return Projections(lambda rows: p.query(rows)[1:2], lambda: p.key()[1:2], p.scale)

    one = replace(
        v,
        features=v.features[1:2],
        index=v.index[1:2],
        size=v.size[1:2],
        layers={i: alone(p) for i, p in v.layers.items()},
    )
    together, single = method.on_features(v), method.on_features(one)
    assert torch.equal(together.keep[1:2], single.keep)
    assert torch.equal(together.group[1:2], single.group)


@pytest.mark.parametrize("name", THREE)
def test_fixed_budgets_compile_without_a_graph_break(name: str) -> None:
    method, v = THREE[name](keep_tokens=2), features_view()

    class View:
        count, total, grid, depth = v.count, v.total, v.grid, v.depth
        index, row, crops = v.index, v.cls_attention(1), None

        def __init__(self, features: Tensor) -> None:
            self.features, self.projected = features, features

        def budget(self, m: Any) -> int:
            return m.budget(self.total, self.grid)

        def cls_attention(self, layer: int) -> Tensor:
            return self.row

        def attention_received(self, layer: int) -> Tensor:
            return self.row.mean(1)

    def step(features: Tensor) -> tuple[Tensor, Tensor]:
        done = method.on_features(View(features))
        return done.keep, done.group

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for mine, want in zip(compiled(v.features), step(v.features), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("name", ["vscan", "tops"])
def test_small_budgets_on_llava(name: str) -> None:
    """Both selections at work, padded rows, two images: dropped is masked, mates do not matter."""
    inputs = mini.prompt([1, 2, 1], pad="left")
    model = mini.build()
    vtc.wrap(model, name, keep_tokens=2)
    (got, steps, _), (want, want_steps, _), alive = compare(
        model, lambda: prefill_and_steps(model, inputs)
    )
    rows = inputs["attention_mask"].bool() & alive[4]
    torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    visual = inputs["input_ids"] == mini.IMAGE
    start = entering(2, 16, model.vtc.methods[0].llm_share)
    for layer, per_image in ((0, start), (2, start), (3, 2), (4, 2)):
        assert (alive.get(layer, alive[4]) & visual).sum(1).tolist() == [
            per_image,
            2 * per_image,
            per_image,
        ]
    real = inputs["attention_mask"][1].bool()
    alone = model(
        input_ids=inputs["input_ids"][1:2, real],
        attention_mask=inputs["attention_mask"][1:2, real],
        pixel_values=inputs["pixel_values"][1:3],
    ).logits
    torch.testing.assert_close(got[1][real], alone[0], atol=1e-5, rtol=1e-5)


def test_half_precision() -> None:
    for name in ("todre", "vscan", "tops"):
        model = mini.build().bfloat16()
        inputs = mini.prompt()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        with vtc.compressing(model, name, keep_tokens=2) as session:
            out = model(**inputs)
            assert out.logits.dtype == torch.bfloat16 and session.report().final_tokens == 2


def test_chains() -> None:
    """Behind a method that has dropped some already."""
    model, inputs = mini.build(), mini.prompt([1, 2], pad="right")
    for later in (ToDRE(keep_tokens=3), VScan(keep_tokens=3), TOPS(keep_tokens=3)):
        with vtc.compressing(model, vtc.chain(Uniform(keep_tokens=10), later)) as session:
            model(**inputs)
            report = session.report()
        assert report.final_tokens == 4.5 == report.asked
        one, *two = map(len, report.kept)  # in the LLM, images of a prompt are ranked together
        assert one == 3 and sum(two) == 6 and all(max(k) < 16 for k in report.kept if len(k))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToDRE(tau=-0.1), r"tau is a share of attention.*in \[0, 1\]; got -0.1"),
        (lambda: ToDRE(tau=1.5), "got 1.5"),
        (lambda: ToDRE(pivot="first"), "pivot is .*got 'first'"),
        (lambda: ToDRE(seed=0.5), "seed is an integer; got 0.5"),
        (lambda: ToDRE.paper("llava-next", 5), r'known: \("llava-next", tokens=288\)'),
        (lambda: VScan(window=0), "window is a side.*got 0"),
        (lambda: VScan(window=True), "got True"),
        (lambda: VScan(llm_share=0), r"llm_share is .*in \(0, 1\].*got 0"),
        (lambda: VScan(keep_ratio=0.1, keep_tokens=3), "not both"),
        (lambda: VScan.paper("llava-1.5", 32), "tokens=64"),
        (lambda: TOPS(llm_share=1.1), "got 1.1"),
        (lambda: TOPS(cover=-1.0), "cover is a weight.*got -1.0"),
        (lambda: TOPS(novel=float("nan")), "novel is a weight.*got nan"),
        (lambda: TOPS(saliency="attention"), "got 'attention'"),
        (lambda: TOPS.paper("llava-1.5", 64), "known: none"),
    ],
)
def test_bad_parameters_say_what_to_do(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
