# SPDX-License-Identifier: Apache-2.0
"""PruMerge, VisPruner, HoloV, CDPruner and TokenCorr: the methods between encoder and LLM."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import mini_anyres as anyres
import mini_llava as mini
import pytest
import test_llava as invariants
import torch
from snapshot import snapshot
from test_methods import BUDGETS, N, features_view, well_formed
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

import vtc
from vtc.errors import UnsupportedError
from vtc.method import _REGISTRY
from vtc.methods.cdpruner import CDPruner, TextQuery, embed_text, greedy_map
from vtc.methods.holov import HoloV, best_of_each, quotas, variances
from vtc.methods.prumerge import PruMerge, outliers, strided
from vtc.methods.tokencorr import TokenCorr, gumbel, informative
from vtc.methods.vispruner import VisPruner, without_duplicates
from vtc.reduction import Reduction
from vtc.views import Projections

METHODS = {
    "prumerge": PruMerge,
    "prumerge plus": lambda **k: PruMerge(plus=True, **k),
    "vispruner": VisPruner,
    "vispruner received": lambda **k: VisPruner(saliency="received", **k),
    "vispruner important": lambda **k: VisPruner(important=1.0, **k),
    "vispruner diverse": lambda **k: VisPruner(important=0.0, **k),
    "holov": HoloV,
    "holov code": lambda **k: HoloV(variant="code", **k),
    "holov tau": lambda **k: HoloV(tau=3.0, chunks=5, saliency="received", **k),
    "cdpruner": lambda **k: CDPruner(relevance="none", **k),
    "cdpruner text": lambda **k: CDPruner(text=query(), **k),
    "tokencorr": TokenCorr,
    "tokencorr drawn": lambda **k: TokenCorr(deterministic=False, seed=3, **k),
    "tokencorr received": lambda **k: TokenCorr(saliency="received", **k),
}
ADAPTIVE = {
    "prumerge": PruMerge(),
    "prumerge plus": PruMerge(plus=True),
    "tokencorr": TokenCorr(similarity=0.1),
    "tokencorr drawn": TokenCorr(similarity=0.1, deterministic=False),
}


def query(rows=1):
    """Text in the space of the first eight features of a patch."""
    text = torch.randn(rows, 8, generator=torch.Generator().manual_seed(9))
    return TextQuery(text, lambda x: x[..., :8])


def split(answer):
    return answer if isinstance(answer, tuple) else (answer, None)


def rows_of(view, rows):
    """The same view with only these images."""

    def part(p):
        return Projections(lambda r: p.query(r)[rows], lambda: p.key()[rows], p.scale)

    return replace(
        view,
        features=view.features[rows],
        size=view.size[rows],
        index=view.index[rows],
        layers={i: part(p) for i, p in view.layers.items()},
    )


# ---- contracts of all of them ------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("k", BUDGETS)
def test_the_budget_is_met_exactly(name, k):
    method = METHODS[name](keep_tokens=k)
    view = features_view(has_cls="cls" in method.needs or "received" not in name)
    reduction, tokens = split(method.on_features(view))
    assert reduction.valid is None
    well_formed(reduction, N, k)
    assert method.has_budget
    if method.merges:
        assert (reduction.group >= 0).all()
    else:
        assert ((reduction.group >= 0).sum(1) == k).all()
    assert tokens is None or tokens.shape == (2, k, view.features.shape[2])


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_a_no_op(name):
    for budget in ({"keep_ratio": 1.0}, {"keep_tokens": N}, {"keep_tokens": 10 * N}):
        assert METHODS[name](**budget).on_features(features_view()) is None


@pytest.mark.parametrize("name", [*METHODS, *(f"{a}, adaptive" for a in ADAPTIVE)])
def test_an_image_does_not_depend_on_its_batch_mates(name):
    adaptive = ADAPTIVE.get(name.removesuffix(", adaptive")) if "adaptive" in name else None
    method = adaptive or METHODS[name](keep_ratio=0.3)
    both = features_view(batch=3)
    together, made = split(method.on_features(both))
    counts = together.counts.tolist()
    for row in range(3):
        alone, tokens = split(method.on_features(rows_of(both, slice(row, row + 1))))
        n = counts[row]
        assert alone.count == n
        assert torch.equal(together.keep[row, :n], alone.keep[0])
        assert torch.equal(together.group[row], alone.group[0])
        if made is not None:
            torch.testing.assert_close(made[row, :n], tokens[0], atol=1e-6, rtol=1e-5)
    if adaptive is not None:
        assert len(set(counts)) > 1, "rows agree: the ragged case is not tested"
        assert all(1 <= n < N for n in counts)
        assert not method.has_budget


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_and_no_side_effects(name):
    method, view = METHODS[name](keep_ratio=0.3), features_view()
    before, state = view.features.clone(), torch.get_rng_state()
    first, _ = split(method.on_features(view))
    assert torch.equal(first.group, split(method.on_features(view))[0].group)
    assert torch.equal(view.features, before) and torch.equal(torch.get_rng_state(), state)
    assert not view.scratch
    half = replace(view, features=view.features.bfloat16())
    reduction, tokens = split(method.on_features(half))
    well_formed(reduction, N, first.count)
    assert tokens is None or tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("name", METHODS)
def test_fixed_budgets_compile_without_a_graph_break(name):
    method = METHODS[name](keep_tokens=9)
    view = features_view()

    def step(x):
        reduction, tokens = split(method.on_features(replace(view, features=x)))
        return reduction.keep, reduction.group, reduction.select(x) if tokens is None else tokens

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for mine, theirs in zip(compiled(view.features), step(view.features), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruMerge(neighbours=-1), "neighbours is a count"),
        (lambda: VisPruner(important=1.2), "share of the budget"),
        (lambda: VisPruner(saliency="mean"), '"cls" or "received"'),
        (lambda: HoloV(chunks=0), "at least 1"),
        (lambda: HoloV(tau=-1.0), "at least 0"),
        (lambda: HoloV(variant="v2"), '"paper" or "code"'),
        (lambda: HoloV(variant="code", tau=2.0), "no tau"),
        (lambda: HoloV(saliency="mean"), '"cls" or "received"'),
        (lambda: CDPruner(relevance="clip"), '"text" or "none"'),
        (lambda: CDPruner(text=torch.ones(1, 8)), "for_prompts"),
        (lambda: CDPruner(relevance="none", text=query()), "leave one"),
        (lambda: CDPruner(relevance="none", inverted=False), "leave inverted out"),
        (lambda: TokenCorr(similarity=1.5), "cosine"),
        (lambda: TokenCorr(duplicates=-1), "at least 0"),
        (lambda: TokenCorr(seed=0.5), "integer"),
        (lambda: TokenCorr(saliency="mean"), '"cls" or "received"'),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("block", [{"early": 99}, {"late": -99}])
def test_blocks_beyond_the_tower_are_refused_at_wrap(block):
    model = mini.build("clip")
    with pytest.raises(UnsupportedError, match=f"block {next(iter(block.values()))} .*give one"):
        vtc.wrap(model, TokenCorr(**block))
    assert not hasattr(model, "vtc")


def test_published_settings():
    assert PruMerge.paper("llava-1.5", tokens=144) == PruMerge(plus=True)
    assert not PruMerge.paper("llava-1.5", tokens=32).has_budget
    assert VisPruner.paper("llava-1.5", tokens=64) == VisPruner(keep_tokens=64)
    assert HoloV.paper("llava-1.5", tokens=192) == HoloV(keep_tokens=192)
    assert CDPruner.paper("llava-1.5", tokens=32).keep_tokens == 32
    with pytest.raises(UnsupportedError, match="known: none"):
        TokenCorr.paper("docowl-1.5", tokens=100)


# ---- oracles on the mini LLaVA: plain loops over what the stock eager model shows ---------------


def stock(seed=0, batch=2):
    """The model, its inputs, and for each image features, hidden states, maps, q and k by block."""
    model = mini.build("clip", attention="eager", seed=seed)
    inputs = mini.prompt(1, batch=batch, seed=seed)
    tower = model.model.vision_tower
    q, k, handles = {}, {}, []
    for i, layer in enumerate(b for n, b in tower.named_modules() if n.split(".")[-1].isdigit()):
        for name, into in (("q_proj", q), ("k_proj", k)):
            module = getattr(layer.self_attn, name)
            handles.append(
                module.register_forward_hook(
                    lambda m, a, out, into=into, i=i: into.__setitem__(i, out)
                )
            )
    with torch.no_grad():
        out = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert sorted(q) == [0, 1, 2, 3]
    return SimpleNamespace(
        model=model,
        inputs=inputs,
        features=out.hidden_states[-2][:, 1:],
        maps=[a[:, :, 0, 1:].mean(1) for a in out.attentions],
        q={i: x.detach() for i, x in q.items()},
        k={i: x.detach() for i, x in k.items()},
    )


@torch.no_grad()
def run(case, method):
    """Patches kept of each image, and what the projector got."""
    seen = []
    with vtc.compressing(case.model, method) as session:
        projector = case.model.model.multi_modal_projector
        handle = projector.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        case.model(**case.inputs)
        handle.remove()
        report = session.report()
    assert report.asked is None or report.asked == report.final_tokens
    assert report.final_tokens == sum(map(len, report.kept)) / len(report.kept)
    return [k.tolist() for k in report.kept], seen[0]


def cosine(a, b):
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def naive_outliers(scores):
    s = sorted(scores.tolist())

    def quantile(p):
        at = p * (len(s) - 1)
        low = math.floor(at)
        return s[low] + (at - low) * (s[min(low + 1, len(s) - 1)] - s[low])

    q1, q3 = quantile(0.25), quantile(0.75)
    return [i for i, x in enumerate(scores.tolist()) if x > q3 + 1.5 * (q3 - q1)]


def best(scores, among, k):
    return sorted(among, key=lambda i: (-float(scores[i]), i))[:k]


def naive_prumerge(case, image, k=None, plus=False, neighbours=32):
    x, key, query = case.features[image], case.k[3][image], case.q[3][image]
    row = (key @ query[0] / key.shape[1] ** 0.5).softmax(0)[1:]
    key, n = key[1:], len(x)
    if k is None:
        chosen = naive_outliers(row) or best(row, range(n), 1)
    else:
        chosen = best(row, range(n), k if plus or k == 1 else k - 1)
    if plus:
        found = naive_outliers(row) or best(row, range(n), 1)
        chosen = best(row, found, len(found) if k is None else k)
        free = [i for i in range(n) if i not in chosen]
        m = min(3 * len(chosen), len(free)) if k is None else k - len(chosen)
        bounds = [j * m // len(free) for j in range(len(free) + 1)]
        chosen += [f for j, f in enumerate(free) if bounds[j + 1] > bounds[j]]
    rest = [i for i in range(n) if i not in chosen]
    tokens = {}
    for i in chosen:
        near = sorted(rest, key=lambda j: -cosine(key[i], key[j]))[:neighbours]
        tokens[i] = x[i] + sum(row[j] * x[j] for j in near)
    if not plus and k != 1:
        tokens[max(rest)] = sum(row[j] * x[j] for j in rest)
    return sorted(tokens), torch.stack([tokens[i] for i in sorted(tokens)])


@pytest.mark.parametrize(
    "settings",
    [
        dict(keep_tokens=6),
        dict(keep_tokens=1),
        dict(keep_tokens=6, plus=True),
        dict(keep_tokens=2, plus=True),
        dict(keep_tokens=6, neighbours=3),
        dict(keep_tokens=6, plus=True, neighbours=0),
        dict(),
        dict(plus=True),
        dict(plus=True, neighbours=2),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prumerge_on_the_mini_llava(settings, seed):
    case = stock(seed)
    kept, tokens = run(case, PruMerge(**settings))
    arguments = {"k" if a == "keep_tokens" else a: x for a, x in settings.items()}
    for image in range(2):
        index, want = naive_prumerge(case, image, **arguments)
        assert kept[image] == index
        torch.testing.assert_close(tokens[image, : len(index)], want, atol=1e-5, rtol=1e-5)


def naive_vispruner(case, image, k, important=0.5):
    x, n = case.features[image], mini.PATCHES
    chosen = best(case.maps[2][image], range(n), int(k * important))
    left = [i for i in range(n) if i not in chosen]
    while len(left) + len(chosen) > k:
        a, b = left[::2], left[1::2]
        edge = {i: max(cosine(x[i], x[j]) for j in b) for i in a}
        r = min(8, len(left) + len(chosen) - k, len(a))
        gone = sorted(a, key=lambda i: (-edge[i], i))[:r]
        left = [i for i in left if i not in gone]
    return sorted(chosen + left)


@pytest.mark.parametrize("k", [2, 5, 6, 9, 13])
def test_vispruner_on_the_mini_llava(k):
    case = stock(k)
    kept, _ = run(case, VisPruner(keep_tokens=k))
    assert kept == [naive_vispruner(case, image, k) for image in range(2)]


def largest_remainder(weight, room, k):
    """Shares by repeated division of what is left among those with room; exact for caps, too."""
    full = {c for c, r in enumerate(room) if r == 0}
    while True:
        rest = k - sum(room[c] for c in full)
        total = sum(w for c, w in enumerate(weight) if c not in full)
        share = {c: rest * w / total for c, w in enumerate(weight) if c not in full}
        more = {c for c, s in share.items() if s >= room[c]}
        if not more:
            break
        full |= more
    quota = [room[c] if c in full else math.floor(share[c]) for c in range(len(weight))]
    order = sorted(share, key=lambda c: (-(share[c] % 1), c))
    for c in order[: k - sum(quota)]:
        quota[c] += 1
    return quota


def naive_holov(case, image, k, chunks, tau, code):
    x, a, n = case.features[image], case.maps[2][image], mini.PATCHES
    chunk = [i * chunks // n for i in range(n)]
    variance = []
    for i in range(n):
        c = [cosine(x[i], x[j]) for j in range(n) if chunk[j] == chunk[i] and j != i]
        mean = sum(c) / max(len(c), 1)
        variance.append(sum((s - mean) ** 2 for s in c) / max(len(c), 1))
    gamma = float(a.mean()) / max(sum(variance) / n, 1e-12)
    h = [float(a[i]) + (0.09 if code else 1) * gamma * variance[i] for i in range(n)]
    members = [[i for i in range(n) if chunk[i] == c] for c in range(chunks)]
    weight = [(sum(h[i] for i in m) / len(m)) ** tau for m in members]
    quota = largest_remainder(weight, [len(m) for m in members], k)
    rank = a if code else h
    return sorted(i for m, q in zip(members, quota, strict=True) for i in best(rank, m, q))


@pytest.mark.parametrize("settings", [(16, 1.0, False), (3, 1.0, False), (3, 2.5, False)])
@pytest.mark.parametrize("k", [2, 6, 11])
def test_holov_on_the_mini_llava(settings, k):
    case, (chunks, tau, _) = stock(3), settings
    kept, _ = run(case, HoloV(keep_tokens=k, chunks=chunks, tau=tau))
    assert kept == [naive_holov(case, i, k, *settings) for i in range(2)]


@pytest.mark.parametrize("k", [2, 6, 11])
def test_holov_as_published_in_code(k):
    case = stock(4)
    kept, _ = run(case, HoloV(keep_tokens=k, chunks=3, variant="code"))
    assert kept == [naive_holov(case, i, k, 3, 1.0, True) for i in range(2)]
    paper, _ = run(case, HoloV(keep_tokens=k, chunks=3))
    assert paper != kept


def naive_tokencorr(case, image, k=None, similarity=0.95, duplicates=8):
    key, n = case.k[1][image][1:], mini.PATCHES
    s = [[cosine(key[i], key[j]) for j in range(n)] for i in range(n)]
    local, late = case.maps[1][image], case.maps[3][image]
    stands_out = naive_outliers(late)
    if k is None:
        redundant = [sum(s[i][j] > similarity for j in range(n) if j != i) > duplicates for i in range(n)]  # fmt: skip
        count = max(1, math.ceil(round(n * (1 - sum(redundant) / n), 9)))
        chosen = set(best(local, range(n), count)) | set(stands_out)
    else:
        chosen = set(best(late, stands_out, k))
        chosen |= set(best(local, [i for i in range(n) if i not in chosen], k - len(chosen)))
    groups = {i: [i] for i in sorted(chosen)}
    for i in range(n):
        if i not in chosen:
            groups[max(sorted(chosen), key=lambda j: s[i][j])].append(i)
    x = case.features[image]
    return sorted(chosen), torch.stack([x[g].mean(0) for g in groups.values()])


@pytest.mark.parametrize(
    "settings",
    [
        dict(keep_tokens=6),
        dict(keep_tokens=1),
        dict(similarity=0.3, duplicates=2),
        dict(similarity=0.1, duplicates=3),
        dict(similarity=-1.0, duplicates=0),  # every patch is redundant
    ],
)
def test_tokencorr_on_the_mini_llava(settings):
    case = stock(5)
    kept, tokens = run(case, TokenCorr(**settings))
    arguments = {"k" if a == "keep_tokens" else a: x for a, x in settings.items()}
    for image in range(2):
        index, want = naive_tokencorr(case, image, **arguments)
        assert kept[image] == index and len(index) < mini.PATCHES
        torch.testing.assert_close(tokens[image, : len(index)], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method", [PruMerge(), PruMerge(plus=True), TokenCorr(similarity=0.2, duplicates=3)]
)
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
@torch.no_grad()
def test_adaptive_counts_run_ragged_and_padded(method, tower):
    """Without a budget images keep what they need; a row alone gives the same logits."""
    model = vtc.wrap(mini.build(tower), method)
    for seed in range(3, 9):  # random weights differ between releases, and rarely images agree
        inputs = mini.prompt([1, 2, 1], pad="left", seed=seed)
        together = model(**inputs).logits
        report = model.vtc.report()
        counts = [len(k) for k in report.kept]
        if len(set(counts)) > 1:
            break
    assert report.asked is None and "asked" not in str(report)
    assert all(1 <= n < mini.PATCHES for n in counts) and len(set(counts)) > 1
    assert report.final_tokens == sum(counts) / 3
    assert report.tokens_per_layer == [report.final_tokens] * 5
    model.generate(**inputs, max_new_tokens=3)
    image = 0
    for r, n in enumerate([1, 2, 1]):
        real = inputs["attention_mask"][r].bool()
        alone = model(
            input_ids=inputs["input_ids"][r : r + 1, real],
            attention_mask=inputs["attention_mask"][r : r + 1, real],
            pixel_values=inputs["pixel_values"][image : image + n],
        ).logits
        assert [len(k) for k in model.vtc.report().kept] == counts[image : image + n]
        image += n
        torch.testing.assert_close(together[r][real], alone[0], atol=1e-5, rtol=1e-5)


# ---- parts -------------------------------------------------------------------------------------


def test_outliers_of_a_row():
    scores = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 14.5, 14.4], [0.0] * 10])
    # Q1 = 3.25 and Q3 = 7.75 of the first row: 7.75 + 1.5 * 4.5 = 14.5 is not above itself
    assert outliers(scores).nonzero().tolist() == []
    scores[0, 8] = 14.51
    assert outliers(scores).nonzero().tolist() == [[0, 8]]


def test_the_class_similarity_takes_heads_as_one():
    view = features_view(batch=1)
    block = view.layers[view.depth - 1]
    q, k = block.query(slice(0, 1))[0, :, 0].flatten(), block.key()[0].transpose(0, 1).flatten(1)
    want = (k @ q / q.numel() ** 0.5).softmax(0)[1:]
    torch.testing.assert_close(view.cls_similarity(-1)[0], want)
    assert view.cls_similarity(-1).sum() < 1  # [CLS] itself has its share


@pytest.mark.parametrize("n", [1, 7, 48])
def test_strided_spreads_evenly(n):
    free = torch.rand(20, n, generator=torch.Generator().manual_seed(n)) < 0.7
    total = free.sum(1)
    for count in range(n + 1):
        wanted = torch.minimum(total, torch.tensor(count))
        got = strided(free, wanted)
        assert torch.equal(got.sum(1), wanted) and not (got & ~free).any()
    spread = strided(torch.ones(1, 48, dtype=torch.bool), torch.tensor([6]))
    assert spread[0].nonzero()[:, 0].diff().tolist() == [8] * 5


def test_duplicates_leave_pair_by_pair():
    """Four directions, each twice in a row: of each pair the one in A goes first."""
    x = torch.eye(4).repeat_interleave(2, 0)[None] + 0.01 * torch.arange(8.0)[None, :, None]
    similarity = torch.nn.functional.normalize(x, dim=2)
    similarity = similarity @ similarity.transpose(1, 2)
    left = torch.arange(8)[None]
    assert without_duplicates(similarity, left, 4).tolist() == [[1, 3, 5, 7]]
    one_by_one = without_duplicates(similarity, left, 4, step=1)
    assert sorted(i // 2 for i in one_by_one[0].tolist()) == [0, 1, 2, 3]
    assert without_duplicates(similarity, left, 8).tolist() == left.tolist()


def test_quotas_meet_the_budget_within_the_room():
    g = torch.Generator().manual_seed(0)
    room = torch.randint(0, 6, (64, 9), generator=g)
    weight = torch.rand(64, 9, generator=g).pow(4)
    for k in range(1, int(room.sum(1).min()) + 1):
        got = quotas(weight, room, k)
        assert (got.sum(1) == k).all() and (got <= room).all() and (got >= 0).all()
        for r in range(0, 64, 7):
            want = largest_remainder(weight[r].clamp(min=1e-12).tolist(), room[r].tolist(), k)
            assert got[r].tolist() == want
    full = quotas(weight[:1], room[:1], int(room[0].sum()))
    assert torch.equal(full, room[:1])
    even = quotas(torch.ones(1, 16), torch.full((1, 16), 36), 70)
    assert even[0].tolist() == [5] * 6 + [4] * 10


def test_variances_and_the_best_of_each_chunk():
    x = torch.tensor([[[1.0, 0], [0, 1], [-1, 0], [3, 0], [0, 2]]])
    chunk = torch.tensor([[0, 0, 0, 1, 1]])
    # cosines: token 0: {0, -1}; token 1: {0, 0}; token 2: {-1, 0}; the second chunk has one pair
    torch.testing.assert_close(variances(x, chunk), torch.tensor([[0.25, 0, 0.25, 0, 0]]))
    scores = torch.tensor([[1.0, 3, 3, 0.5, 2]])
    got = best_of_each(scores, chunk, torch.tensor([[2, 1]]))
    assert got[0].tolist() == [False, True, True, False, True]
    assert best_of_each(scores, chunk, torch.tensor([[1, 0]]))[0].tolist() == [0, 1, 0, 0, 0]


def test_holov_in_code_ranks_a_chunk_by_attention_alone():
    view = features_view(batch=4)
    attention = view.cls_attention(-2).mean(1)
    kept = {
        variant: HoloV(keep_tokens=20, chunks=3, variant=variant).on_features(view).keep
        for variant in ("paper", "code")
    }
    by_attention = {"paper": True, "code": True}
    for variant, keep in kept.items():
        for row in range(4):
            for chunk in range(3):
                members = range(chunk * N // 3, (chunk + 1) * N // 3)
                mine = [i for i in keep[row].tolist() if i in members]
                by_attention[variant] &= mine == sorted(best(attention[row], members, len(mine)))
    assert by_attention == {"paper": False, "code": True}


def test_holov_finds_its_chunks_by_place():
    """Behind a method that took whole rows away, a patch stays in the chunk it was in."""
    view = features_view()
    keep = torch.arange(N // 2, N)  # the lower half: chunks 8 to 15
    half = Reduction.from_keep(keep.expand(2, -1), N)
    lower = replace(view, features=half.select(view.features), size=half.select(view.size), index=half.keep)  # fmt: skip
    for p in lower.layers.values():
        p.later = Reduction.from_keep(torch.cat([torch.zeros(1).long(), keep + 1]).expand(2, -1), N + 1)  # fmt: skip
    got = HoloV(keep_tokens=8, tau=0.0).on_features(lower)
    chunks = lower.index.gather(1, got.keep) * 16 // N
    assert chunks.tolist() == [list(range(8, 16))] * 2


def test_informative_counts_near_duplicates():
    angle = torch.tensor([0.0, 1, 2, 90, 91, 180]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)[None]
    assert informative(x, 0.9, 0).tolist() == [1]  # only the last has no near duplicate
    assert informative(x, 0.9, 1).tolist() == [3]
    assert informative(x, 0.9, 2).tolist() == [6]
    assert informative(torch.ones(1, 6, 2), 0.9, 2).tolist() == [1]  # a blank image keeps one


def test_the_draw_follows_its_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    index = torch.arange(4)[None]
    draws = [int((p.log() + gumbel(index, seed)).argmax()) for seed in range(4000)]
    share = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    torch.testing.assert_close(share, p, atol=0.03, rtol=0)
    view, kept = features_view(batch=1), set()
    for seed in range(5):
        method = TokenCorr(keep_tokens=8, deterministic=False, seed=seed)
        kept.add(tuple(method.on_features(view).keep[0].tolist()))
    assert len(kept) > 1


# ---- CDPruner ----------------------------------------------------------------------------------

SIX = torch.tensor([[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.8, 0.6], [0, 0, 1], [0.5, 0.5, 0.5]])
RELEVANCE = torch.tensor([[0.9, 1, 0.6, 0.5, 0.3, 0.8]])


def test_cdpruner_worked_example():
    order, gain = greedy_map(SIX[None], RELEVANCE, 3)
    assert order[0].tolist() == [1, 5, 2]
    torch.testing.assert_close(gain.cumprod(1)[0], torch.tensor([1, 0.3798, 0.0759]), rtol=0, atol=5e-5)  # fmt: skip


def naive_dpp(x, relevance, k):
    """Greedy by the determinants themselves, in double precision."""
    x = torch.nn.functional.normalize(x.double(), dim=1) * relevance.double()[:, None]
    kernel, chosen = x @ x.T, []
    kernel.diagonal().copy_(relevance.double().square())  # ties are ties
    for _ in range(k):
        left = [i for i in range(len(x)) if i not in chosen]
        det = {i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in left}
        chosen.append(max(left, key=lambda i: (det[i], -i)))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_greedy_map_maximises_the_determinant(seed):
    g = torch.Generator().manual_seed(seed)
    x, relevance = torch.randn(2, 30, 20, generator=g), torch.rand(2, 30, generator=g)
    order, gain = greedy_map(x, relevance, 12)
    for row in range(2):
        assert order[row].tolist() == naive_dpp(x[row], relevance[row], 12)
        unit = torch.nn.functional.normalize(x[row].double(), dim=1) * relevance[row, :, None]
        chosen = unit[order[row]]
        torch.testing.assert_close(gain[row].double().prod(), (chosen @ chosen.T).det(), rtol=1e-3, atol=0)  # fmt: skip


def test_greedy_map_beyond_the_rank():
    """In the plane two tokens span everything; the others follow by relevance."""
    g = torch.Generator().manual_seed(0)
    x, relevance = torch.randn(1, 40, 2, generator=g), torch.rand(1, 40, generator=g)
    order = greedy_map(x, relevance, 40)[0][0]
    assert sorted(order.tolist()) == list(range(40))
    assert order[:2].tolist() == naive_dpp(x[0], relevance[0], 2)
    assert (relevance[0, order[2:]].diff() <= 0).all()
    same = greedy_map(torch.ones(1, 9, 4), torch.ones(1, 9), 5)[0]
    assert same.tolist() == [[0, 1, 2, 3, 4]]


def test_relevance_is_scaled_within_each_image():
    view = features_view(batch=3)
    method = CDPruner(text=query())
    r = method.relevances(view)
    assert torch.equal(r.amin(1), torch.zeros(3)) and torch.equal(r.amax(1), torch.ones(3))
    text = query().embedding[0]
    for image in range(3):
        c = torch.tensor([cosine(x[:8], text) for x in view.features[image]])
        want = (-c - (-c).min()) / ((-c).max() - (-c).min())
        torch.testing.assert_close(r[image], want, atol=1e-5, rtol=1e-5)
    upright = CDPruner(text=query(), inverted=False).relevances(view)
    torch.testing.assert_close(upright, 1 - r, atol=1e-6, rtol=0)
    flat = replace(view, features=torch.ones_like(view.features))
    assert torch.equal(method.relevances(flat), torch.ones(3, N))


def test_a_question_for_each_image():
    view = features_view(batch=3)
    together = CDPruner(keep_tokens=7, text=query(3)).on_features(view)
    for row in range(3):
        own = TextQuery(query(3).embedding[row : row + 1], query().project)
        alone = CDPruner(keep_tokens=7, text=own).on_features(rows_of(view, slice(row, row + 1)))
        assert torch.equal(together.keep[row], alone.keep[0])
    for wrong in (query(2), TextQuery(torch.ones(8), query().project)):
        with pytest.raises(ValueError, match="one row for each image"):
            CDPruner(keep_tokens=7, text=wrong).on_features(view)


def test_without_text_it_refuses_before_anything_runs():
    model = mini.build()
    before = snapshot(model)
    with pytest.raises(
        UnsupportedError, match=r"for_prompts.*relevance=\"none\".*do without: .*divprune"
    ):
        vtc.wrap(model, "cdpruner", keep_tokens=6)
    assert snapshot(model) == before
    vtc.wrap(model, "cdpruner", keep_tokens=6, relevance="none")


class Words:
    """A tokenizer: one id for each letter."""

    bos_token_id, eos_token_id = 1, 63

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) % 60 + 2 for c in text]}


def clip_of(tower):
    """A random CLIP around a vision tower."""
    torch.manual_seed(7)
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(
        vocab_size=64,
        max_position_embeddings=10,
        projection_dim=12,
        bos_token_id=1,
        eos_token_id=63,
    )
    config = CLIPConfig(text_config=text, vision_config=tower.config.to_dict(), projection_dim=12)
    clip = CLIPModel(config).eval()
    with torch.no_grad():
        for name, weight in clip.named_parameters():
            if weight.dim() == 2:
                weight.mul_(8.0)
            if "post_layernorm" in name:
                weight.add_(torch.randn_like(weight))
    return clip


def test_text_is_embedded_in_pieces():
    clip = clip_of(mini.build().model.vision_tower)
    only = CLIPTextModelWithProjection(clip.config.text_config).eval()
    only.load_state_dict({k: v for k, v in clip.state_dict().items() if k in only.state_dict()})

    def reference(ids):
        return only(input_ids=torch.tensor([[1, *ids, 63]])).text_embeds[0]

    ids = Words()("a red square?", False)["input_ids"]  # 13 letters: pieces of 8 and 5
    with torch.no_grad():
        want = (reference(ids[:8]) + reference(ids[8:])) / 2
        for tower in (clip, only):
            got = embed_text(tower, Words(), ["a red square?", "red", ""])
            torch.testing.assert_close(got[0], want)
            torch.testing.assert_close(got[1], reference(Words()("red", False)["input_ids"]))
            torch.testing.assert_close(got[2], reference([]))
    with pytest.raises(UnsupportedError, match="project="):
        CDPruner.for_prompts(only, Words(), "red", keep_tokens=4)


@pytest.mark.parametrize("k", [3, 6, 10])
@torch.no_grad()
def test_cdpruner_on_the_mini_llava(k):
    case = stock(6)
    tower, projector = case.model.model.vision_tower, case.model.model.multi_modal_projector
    clip = clip_of(tower)
    prompts = ["a red square?", "blue"]
    kept, _ = run(case, CDPruner.for_prompts(clip, Words(), prompts, keep_tokens=k))
    text = embed_text(clip, Words(), prompts)
    for image in range(2):
        x = case.features[image]
        p = clip.visual_projection(clip.vision_model.post_layernorm(x))
        r = torch.tensor([-cosine(patch, text[image]) for patch in p])
        r = (r - r.min()) / (r.max() - r.min())
        assert kept[image] == sorted(naive_dpp(projector(x), r, k))
    plain, _ = run(case, CDPruner(relevance="none", keep_tokens=k))
    assert plain == [
        sorted(naive_dpp(projector(x), torch.ones(mini.PATCHES), k)) for x in case.features
    ]
    assert plain != kept


def test_prompts_may_be_asked_for_at_each_forward():
    case, now = stock(6), ["blue"]
    clip = clip_of(case.model.model.vision_tower)
    method = CDPruner.for_prompts(clip, Words(), lambda: now, keep_tokens=6)
    assert "asked at each forward" in str(method) and "tensor" not in str(method)
    kept = []
    for prompt in ("blue", "a red square?", "blue"):
        now[0] = prompt
        kept.append(run(case, method)[0])
        fixed = CDPruner.for_prompts(clip, Words(), prompt, keep_tokens=6)
        assert kept[-1] == run(case, fixed)[0]
    assert kept[0] == kept[2] != kept[1]


@dataclass(frozen=True, kw_only=True)
class Plain(CDPruner):
    """CDPruner's variant without text, which needs nothing."""

    relevance: str = "none"
    needs = frozenset()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(
    "invariant",
    ["test_dropped_is_masked", "test_keeping_all_is_stock", "test_batch_mates_do_not_matter"],
)
def test_the_variant_without_text_keeps_the_invariants(invariant, tower, monkeypatch):
    monkeypatch.setitem(_REGISTRY, "cdpruner", Plain)
    getattr(invariants, invariant)("cdpruner", tower, "llama")


@pytest.mark.slow
@torch.no_grad()
def test_cdpruner_on_the_embedded_model():
    """The text tower was trained on [class token; mean patch] of this tower: each patch as both."""
    from vtc.benchmarks.tasks.base import Task
    from vtc.benchmarks.tiny.models import load_llava, load_retrieval

    model, processor = load_llava()
    tower, text, projection, tokenizer, _ = load_retrieval()
    norm = tower.layernorm

    def project(x):
        return projection(torch.cat([norm(x), norm(x)], -1))

    item = Task("scenes", n=1)[0]
    prompt = f"USER: <image>\n{item.question} ASSISTANT:"
    inputs = processor(text=[prompt], images=[item.image], return_tensors="pt")
    kept = {}
    for question in (item.question, "a red circle", "a blue square on the left"):
        method = CDPruner.for_prompts(text, tokenizer, question, project, keep_tokens=64)
        with vtc.compressing(model, method) as session:
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            report = session.report()
        assert report.final_tokens == report.asked == 64
        assert out.shape[1] > inputs["input_ids"].shape[1]
        kept[question] = tuple(report.kept[0].tolist())
    assert len(set(kept.values())) == 3


@pytest.mark.parametrize("name", [*METHODS, *(f"{a}, adaptive" for a in ADAPTIVE)])
@torch.no_grad()
def test_crops_of_llava_next(name):
    """Views are parts of what the tower saw, of several shapes; images keep their budgets."""
    if name == "cdpruner text":
        method = CDPruner(keep_tokens=14, text=query())
    else:
        method = ADAPTIVE.get(name.removesuffix(", adaptive")) if "adaptive" in name else None
        method = method or METHODS[name](keep_tokens=14)
    model = anyres.build("next")
    with vtc.compressing(model, method) as session:
        for sizes in ([anyres.WIDE, anyres.SQUARE], [anyres.TALL]):
            model(**anyres.prompt([[size] for size in sizes]))
            report = session.report()
            full = [anyres.patches_of(size) for size in sizes]
            counts = [len(k) for k in report.kept]
            if method.has_budget:
                assert report.final_tokens == report.asked == 14
                assert counts == [14] * len(sizes)
            else:
                assert all(1 <= n < m for n, m in zip(counts, full, strict=True))


@torch.no_grad()
def test_class_similarity_of_a_thumbnail():
    """Up to the [CLS] column, which is the same factor for all patches, from the logits."""
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Spy(PruMerge):
        def on_features(self, v):
            seen.append((v.total, v.cls_similarity(-1), v.cls_logits(-1).sum(1)))

    with vtc.compressing(anyres.build("next"), Spy(keep_tokens=14)) as session:
        session.model(**anyres.prompt([[anyres.WIDE], [anyres.SQUARE]]))
    thumbnails = [(a, logits) for total, a, logits in seen if total == anyres.PATCHES]
    assert thumbnails
    for a, logits in thumbnails:
        want = (logits / 2**0.5).softmax(1)  # two heads
        torch.testing.assert_close(a / a.sum(1, keepdim=True), want, atol=1e-5, rtol=1e-4)
