# SPDX-License-Identifier: Apache-2.0
"""The first methods on synthetic views: budgets, schedules, choices, errors."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import vtc
from vtc.errors import UnsupportedError
from vtc.kernels import similarity_reduce
from vtc.method import known_methods, register, resolve
from vtc.methods._common import unit
from vtc.methods.divprune import DivPrune, greedy_order
from vtc.methods.downsample import Downsample, smaller_grid
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.pitome import BACKBONES, PiToMe, match_energy
from vtc.methods.pool import Pool, cells
from vtc.methods.random import Random
from vtc.methods.tome import ToMe, even_counts, match, match_parity
from vtc.methods.uniform import Uniform
from vtc.methods.visionzip import VisionZip
from vtc.reduction import Reduction, top_k
from vtc.views import DecoderView, FeaturesView, Projections, VisionView

DEPTH, HEADS, WIDTH = 6, 4, 32
GRID = (6, 8)
N = GRID[0] * GRID[1]


def projections(batch, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, HEADS, tokens, 8, generator=generator)
    return Projections(lambda rows: q[:, :, rows], lambda: k, 8**-0.5)


def vision_view(layer=0, batch=2, prefix=1, grid=GRID, seed=0, x=None, depth=DEPTH):
    total = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed + 1)
    if x is None:
        x = torch.randn(batch, prefix + total, WIDTH, generator=generator)
    return VisionView(
        x=x,
        layer=layer,
        depth=depth,
        prefix=prefix,
        has_cls=prefix > 0,
        size=torch.ones(x.shape[:2]),
        total=total,
        grid=grid,
        projections=projections(len(x), x.shape[1], seed),
    )


def features_view(batch=2, grid=GRID, seed=0, has_cls=True, depth=DEPTH):
    total = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed + 2)
    prefix = int(has_cls)
    return FeaturesView(
        features=torch.randn(batch, total, WIDTH, generator=generator),
        size=torch.ones(batch, total),
        index=torch.arange(total).expand(batch, total),
        total=total,
        grid=grid,
        prefix=prefix,
        has_cls=has_cls,
        projector=lambda x: x[..., : WIDTH // 2] * 2,
        layers={i: projections(batch, prefix + total, seed + i) for i in range(depth)},
        depth=depth,
    )


def decoder_view(images, layer=1, text=5):
    """Rows of visual tokens, then text, right-padded; the attention is random but fixed."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([sum(row) for row in images])
    n = int(counts.max())
    length = n + text
    column = torch.arange(length)
    visual = column < counts[:, None]
    is_text = (column >= counts[:, None]) & (column < counts[:, None] + text)
    valid = torch.arange(n) < counts[:, None]
    weights = torch.rand(len(images), HEADS, length, length, generator=generator).softmax(-1)

    def attention(rows):
        return weights.gather(2, rows[:, None, :, None].expand(-1, HEADS, -1, length))

    return DecoderView(
        hidden=torch.randn(len(images), length, WIDTH, generator=generator),
        layer=layer,
        depth=8,
        visual=visual,
        text=is_text,
        visual_index=torch.arange(n).expand(len(images), n),
        valid=None if bool(valid.all()) else valid,
        image=torch.zeros(len(images), n, dtype=torch.int64),
        position=torch.arange(n).expand(len(images), n),
        images=images,
        tap=SimpleNamespace(attention=attention, sublayers={}, length=length),
        ahead=lambda: None,
    ), weights


def encode(method, prefix=1, batch=2, grid=GRID, depth=DEPTH, seed=0):
    """Run a vision method through an encoder without attention; its map and the counts."""
    view = vision_view(batch=batch, prefix=prefix, grid=grid, seed=seed)
    x, size = view.x, None
    done = Reduction.identity(batch, x.shape[1])
    counts = []
    for layer in range(depth):
        v = vision_view(layer, batch, prefix, grid, seed + layer, x, depth)
        step = method.on_vision_layer(v)
        if step is not None:
            assert step.valid is None
            x, size = step.merge(x, size)
            done = done.then(step)
        counts.append(x.shape[1] - prefix)
    return done, counts


BUDGETS = [1, 2, 3, 5, 7, 12, 13, 24, 31, N // 2, N - 2, N - 1]

VISION = {
    "tome": ToMe,
    "pitome": PiToMe,
    "pitome paper": lambda **k: PiToMe(energy="paper", **k),
    "pitome bsm": lambda **k: PiToMe(matching="bsm", **k),
    "pitome pitome_bsm": lambda **k: PiToMe(matching="pitome_bsm", **k),
    **{f"pitome {name}": lambda name=name, **k: PiToMe.preset(name, **k) for name in BACKBONES},
}
FEATURES = {
    "visionzip": VisionZip,
    "visionzip received": lambda **k: VisionZip(saliency="received", **k),
    "fastervlm": FasterVLM,
    "divprune": DivPrune,
    "random": Random,
    "uniform": Uniform,
    "pool": Pool,
}


def well_formed(reduction, n, k):
    assert reduction.source_count == n and reduction.count == k
    assert (reduction.keep.diff(dim=1) > 0).all()
    slots = torch.arange(k).expand_as(reduction.keep)
    assert torch.equal(reduction.group.gather(1, reduction.keep), slots)
    assert reduction.group.min() >= -1 and reduction.group.max() < k


# ---- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("k", BUDGETS)
def test_vision_methods_reach_the_budget(name, k, prefix):
    method = VISION[name](keep_tokens=k)
    steps = DEPTH - getattr(method, "skip_last", 0)
    if (k << steps) < N:
        with pytest.raises(ValueError, match=r"needs a layer|out of reach"):
            encode(method, prefix)
        return
    done, counts = encode(method, prefix)
    well_formed(done, prefix + N, prefix + k)
    assert counts[-1] == k
    assert (done.group >= 0).all(), "merging drops nothing"
    # Prefix tokens survive and absorb nobody.
    assert done.keep[:, :prefix].tolist() == [list(range(prefix))] * 2
    for p in range(prefix):
        assert ((done.group == p).sum(1) == 1).all()


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("k", BUDGETS)
def test_feature_methods_meet_the_budget(name, k):
    method = FEATURES[name](keep_tokens=k)
    reduction = method.on_features(features_view(has_cls="cls" in method.needs))
    assert reduction.valid is None
    well_formed(reduction, N, k)
    assert method.budget(N) == k
    if method.merges and not (name.startswith("visionzip") and method.split(k)[1] == 0):
        assert (reduction.group >= 0).all()
    else:
        assert ((reduction.group >= 0).sum(1) == k).all()


@pytest.mark.parametrize("name", [*VISION, *FEATURES])
def test_keeping_everything_is_a_no_op(name):
    for budget in ({"keep_ratio": 1.0}, {"keep_tokens": N}, {"keep_tokens": 10 * N}):
        method = {**VISION, **FEATURES}[name](**budget)
        if name in VISION:
            assert all(method.on_vision_layer(vision_view(i)) is None for i in range(DEPTH))
        else:
            assert method.on_features(features_view()) is None


def test_keeping_everything_is_a_no_op_elsewhere():
    view, _ = decoder_view([[20]])
    assert FastV(keep_ratio=1.0).on_decoder_layer(view) is None
    assert Downsample(keep_ratio=1.0).on_pixels(GRID) is None


@pytest.mark.parametrize("name", [*VISION, *FEATURES])
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    method = {**VISION, **FEATURES}[name](keep_ratio=0.3)
    if name in VISION:
        both, one = vision_view(layer=2, batch=2), vision_view(layer=2, batch=2)
        run = method.on_vision_layer
    else:
        both, one = features_view(), features_view()
        run = method.on_features
    # The second row alone, through views that hold nothing else.
    second = {
        field: getattr(one, field)[1:]
        for field in (("x", "size") if name in VISION else ("features", "size", "index"))
    }

    def row(p):
        return Projections(lambda rows: p.query(rows)[1:], lambda: p.key()[1:], p.scale)

    if name in VISION:
        second["projections"] = row(one.projections)
    else:
        second["layers"] = {i: row(p) for i, p in one.layers.items()}
    together, alone = run(both), run(replace(one, **second))
    assert torch.equal(together.keep[1:], alone.keep)
    assert torch.equal(together.group[1:], alone.group)


@pytest.mark.parametrize("name", [*VISION, *FEATURES])
def test_methods_leave_the_view_and_the_random_state_alone(name):
    method = {**VISION, **FEATURES}[name](keep_ratio=0.3)
    view = vision_view() if name in VISION else features_view()
    x = view.x if name in VISION else view.features
    before, state = x.clone(), torch.get_rng_state()
    run = method.on_vision_layer if name in VISION else method.on_features
    first = run(view)
    assert torch.equal(first.group, run(view).group)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not view.scratch


@pytest.mark.parametrize("name", [*VISION, *FEATURES])
def test_fixed_budgets_compile_without_a_graph_break(name):
    method = {**VISION, **FEATURES}[name](keep_ratio=0.3)
    if name in VISION:
        v = vision_view(layer=1)
        run, x = method.on_vision_layer, v.x
        fields = ("layer", "depth", "prefix", "count", "total", "grid", "size", "key_mean")
    else:
        v = features_view(has_cls="received" not in name)
        run, x = method.on_features, v.features
        fields = ("count", "total", "grid", "projected")

    class View:
        in_sequence = VisionView.in_sequence

        def __init__(self, x):
            self.x = self.features = x

        def cls_attention(self, layer):
            return self.row

        def attention_received(self, layer):
            return self.row.mean(1)

        def key(self, layer):
            return self.keys

        def budget(self, method):
            return method.budget(self.total, self.grid)

    if name in FEATURES:
        View.row = projections(2, N).attention(slice(0, 1))[:, :, 0]
        View.keys = v.key(-2)
    for field in fields:
        setattr(View, field, getattr(v, field))

    def step(x):
        reduction = run(View(x))
        return reduction.merge(x)[0], reduction.group

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for mine, theirs in zip(compiled(x), step(x), strict=True):
        torch.testing.assert_close(mine, theirs)


# ---- ToMe --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 48, 196, 576])
@pytest.mark.parametrize("steps", [1, 2, 5, 12, 23])
def test_even_counts_reach_everything_that_can_be_reached(n, steps):
    for k in range(1, n + 1):
        if n > k << steps:
            with pytest.raises(ValueError, match="at most half"):
                even_counts(n, k, steps)
            continue
        counts = [n, *even_counts(n, k, steps)]
        removed = [a - b for a, b in pairwise(counts)]
        assert counts[-1] == k and len(removed) == steps
        assert all(0 <= r <= a // 2 for r, a in zip(removed, counts, strict=False))
        if n - k <= steps * k:  # even removal never needs more than half
            assert max(removed) - min(removed) <= 1


def test_tome_published_schedule_is_r_per_block():
    assert ToMe(r=5).schedule(48, 6) == [43, 38, 33, 28, 23, 18]
    assert ToMe(r=30).schedule(48, 6) == [24, 12, 6, 3, 2, 1]
    _, counts = encode(ToMe(r=5))
    assert ToMe(r=5).schedule(48, 6, prefix=1) == counts
    assert counts == [43, 38, 33, 28, 23, 18]
    assert ToMe(r=0).on_vision_layer(vision_view()) is None


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_tome_is_bipartite_and_takes_the_best_edges(prefix):
    v = vision_view(prefix=prefix, batch=1)
    r = 9
    x = unit(v.key_mean)
    into = match_parity(x, r, prefix)[0]
    moved = torch.nonzero(into != torch.arange(len(into)))[:, 0]
    assert len(moved) == r
    assert (moved % 2 == 0).all() and (into[moved] % 2 == 1).all()
    assert (moved >= prefix).all() and (into[moved] >= prefix).all()
    s = x[0] @ x[0].T
    candidates = [a for a in range(len(s)) if a % 2 == 0 and a >= prefix]
    odd = [b for b in range(len(s)) if b % 2 == 1 and b >= prefix]
    edges = {a: max((s[a, b].item(), -b) for b in odd) for a in candidates}
    best = sorted(candidates, key=lambda a: (-edges[a][0], a))[:r]
    assert sorted(best) == moved.tolist()
    assert all(into[a] == -edges[a][1] for a in best)


def test_equal_edges_go_to_the_first_tokens():
    many = match_parity(unit(torch.ones(1, 700, 3)), 5, 0)[0]
    assert torch.nonzero(many != torch.arange(700))[:, 0].tolist() == [0, 2, 4, 6, 8]
    x = unit(torch.ones(1, 8, 3))
    assert match_parity(x, 2, 0)[0].tolist() == [1, 1, 1, 3, 4, 5, 6, 7]
    assert match_parity(x, 2, 1)[0].tolist() == [0, 1, 1, 3, 1, 5, 6, 7]


# ---- PiToMe ------------------------------------------------------------------------------------

LLAVA = {
    0.9: "520,468,422,380,342,308,278,251,226,204,184,166,150,136,123,111,100,91,82,74,67,61,55",
    0.925: "534,494,457,423,392,363,336,311,288,267,247,229,212,197,183,170,158,147,137,127,118,110,102",
}


@pytest.mark.parametrize("ratio", LLAVA)
def test_pitome_llava_schedule(ratio):
    published = [int(c) for c in LLAVA[ratio].split(",")]
    schedule = PiToMe.preset("llava", ratio=ratio).schedule(576, 23, prefix=1)
    assert [c + 1 for c in schedule] == published  # the published counts include [CLS]


@pytest.mark.parametrize(("ratio", "tokens"), [(0.9, 54), (0.925, 101), (0.95, 183), (0.975, 330)])
def test_pitome_llava_presets(ratio, tokens):
    method = PiToMe.paper("llava-1.5", tokens=tokens)
    assert method == PiToMe.preset("llava", ratio=ratio)
    assert method.schedule(576, 23, prefix=1)[-1] == tokens
    assert method.vision_site == "output" and method.metric == "hidden"
    assert not method.track_size and not method.proportional_attention
    assert [method.matching_at(i, 23) for i in range(23)] == ["bsm"] * 13 + ["pitome"] * 10


def test_pitome_presets_of_other_backbones():
    timm, mae = PiToMe.preset("timm", ratio=0.9), PiToMe.preset("mae", ratio=0.9)
    assert [timm.matching_at(i, 5) for i in range(5)] == ["pitome_bsm"] * 3 + ["pitome"] * 2
    assert [mae.matching_at(i, 4) for i in range(4)] == ["pitome"] * 2 + ["pitome_bsm"] * 2
    bsm = PiToMe(ratio=0.9, matching="bsm")
    assert bsm.schedule(39, 5) == bsm.schedule(39, 5, prefix=0) != bsm.schedule(39, 5, prefix=1)
    blip = PiToMe.preset("blip", keep_tokens=12)
    assert blip.schedule(48, 6)[-2:] == [12, 12] and blip.schedule(48, 6)[-3] > 12
    default = PiToMe()
    assert default.metric == "key" and default.track_size and default.proportional_attention
    assert default.vision_site == "middle" and default.energy == "elu"
    assert PiToMe.preset("blip2").proportional_attention
    with pytest.raises(UnsupportedError, match="known: timm, mae"):
        PiToMe.preset("resnet")


@pytest.mark.parametrize("name", BACKBONES)
def test_pitome_ratio_runs_in_every_preset(name):
    method = PiToMe.preset(name, ratio=0.8)
    _, counts = encode(method)
    assert counts == method.schedule(N, DEPTH, prefix=1)
    assert encode(PiToMe.preset(name, ratio=1.0))[1] == [N] * DEPTH


def test_pitome_margin_follows_the_depth(monkeypatch):
    seen, stock = [], similarity_reduce.energy

    def spy(x, margin, alpha, kind):
        seen.append(margin)
        return stock(x, margin, alpha, kind)

    monkeypatch.setattr(similarity_reduce, "energy", spy)
    for method, layer, expected in (
        (PiToMe(keep_ratio=0.5), 0, 0.9),
        (PiToMe(keep_ratio=0.5), 3, 0.45),
        (PiToMe.preset("blip2", ratio=0.9), 3, 0.55),
        (PiToMe.preset("llava", ratio=0.9, first=None), 4, 0.75),
    ):
        method.on_vision_layer(vision_view(layer))
        assert seen.pop() == pytest.approx(expected)


@pytest.mark.parametrize("protect", [True, False])
def test_pitome_does_not_depend_on_the_order_of_the_patches(protect):
    x = unit(torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(3)))
    shuffle = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    into = match_energy(x, similarity_reduce.energy(x, 0.3), 9, protect)
    moved = match_energy(x[:, shuffle], similarity_reduce.energy(x[:, shuffle], 0.3), 9, protect)
    assert torch.equal(shuffle[moved], into[:, shuffle])


def test_pitome_protects_low_energy():
    x = unit(torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(3)))
    energy = similarity_reduce.energy(x, 0.3)
    into = match_energy(x, energy, 6)
    low = energy[0].argsort(stable=True)[:18]
    assert torch.equal(into[0, low], low)
    assert (into[0] != torch.arange(30)).sum() == 6
    # Every other one of the twelve highest folds into its best partner among the rest of them.
    high = energy[0].argsort(descending=True, stable=True)[:12]
    a, b = high[0::2], high[1::2]
    assert torch.equal(into[0, a], b[(x[0, a] @ x[0, b].T).argmax(1)])


@pytest.mark.parametrize("matching", ["pitome", "pitome_bsm", "bsm"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_pitome_on_a_view_is_its_matching_behind_the_prefix(matching, prefix):
    v = vision_view(layer=0, prefix=prefix)
    x, r = unit(v.key_mean), 8
    if matching == "bsm":
        into = match_parity(x, r, prefix)
    else:
        patches = x[:, prefix:]
        into = (
            match_energy(patches, similarity_reduce.energy(patches, 0.9), r, matching == "pitome")
            + prefix
        )
        into = torch.cat([torch.arange(prefix).expand(2, -1), into], 1)
    method = PiToMe(matching=matching, ratio=1 - (r + 0.5) / N)
    reduction = method.on_vision_layer(v)
    assert torch.equal(reduction.group, Reduction.from_merge(into).group)


@pytest.mark.parametrize("name", VISION)
def test_no_block_merges_more_than_half_of_what_it_finds(name):
    """Even where the blocks before it did not do their part."""
    late = VISION[name](keep_tokens=3).on_vision_layer(vision_view(layer=4))
    assert late.count == 1 + N // 2


def test_pitome_metric_and_site_change_what_is_compared():
    v = vision_view(layer=1)
    by_key = PiToMe(keep_ratio=0.5).on_vision_layer(v)
    by_hidden = PiToMe(keep_ratio=0.5, metric="hidden").on_vision_layer(v)
    assert not torch.equal(by_key.group, by_hidden.group)
    other = replace(v, x=torch.randn_like(v.x))
    assert torch.equal(PiToMe(keep_ratio=0.5).on_vision_layer(other).group, by_key.group)


def test_matching_takes_unsorted_sides():
    x = unit(torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]]]))
    into = match(x, torch.tensor([[2, 1]]), torch.tensor([[3, 0]]), 2)
    assert into[0].tolist() == [0, 3, 0, 3]
    assert match(x, torch.tensor([[2, 1]]), torch.tensor([[3, 0]]), 1)[0].tolist() == [0, 1, 0, 3]


# ---- before the LLM ----------------------------------------------------------------------------


def test_fastervlm_is_top_k_of_the_last_cls_row():
    v = features_view()
    last = v.layers[DEPTH - 1].attention(slice(None))[:, :, 0, 1:].mean(1)
    assert torch.equal(FasterVLM(keep_tokens=9).on_features(v).keep, top_k(last, 9))
    assert FasterVLM().captures(24) == (23,)
    with pytest.raises(UnsupportedError, match=r"\[CLS\]"):
        FasterVLM().on_features(features_view(has_cls=False))


@pytest.mark.parametrize(
    ("k", "split"), [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (1, (1, 0))]
)
def test_visionzip_split(k, split):
    assert VisionZip().split(k) == split


def test_divprune_paper():
    assert DivPrune.paper("llava-1.5", tokens=56).budget(576) == 56


def test_visionzip_paper():
    for tokens in (64, 128, 192):
        assert VisionZip.paper("llava-1.5", tokens=tokens).budget(576) == tokens
    assert VisionZip().captures(24) == (22,)
    assert VisionZip().needs == VisionZip.needs == {"cls"}
    assert VisionZip(saliency="received").needs == frozenset()


def test_visionzip_by_hand():
    v = features_view(batch=1)
    reduction = VisionZip(keep_tokens=14, contextual=4).on_features(v)
    layer = v.layers[DEPTH - 2]
    cls = layer.attention(slice(None))[0, :, 0, 1:].sum(0)
    dominant = cls.argsort(descending=True, stable=True)[:10].sort().values.tolist()
    rest = [i for i in range(N) if i not in dominant]
    targets = rest[:: len(rest) // 4][:4]
    assert reduction.keep[0].tolist() == sorted(dominant + targets)
    key = unit(layer.key().mean(1)[0, 1:])
    for i in range(N):
        representative = reduction.keep[0, reduction.group[0, i]].item()
        if i in dominant or i in targets:
            assert representative == i
        else:
            assert representative == targets[int((key[targets] @ key[i]).argmax())]


def test_visionzip_targets_stay_even_when_keys_are_equal():
    v = features_view(batch=1)
    key = torch.ones(1, HEADS, N + 1, 8)
    v.layers[DEPTH - 2] = replace(v.layers[DEPTH - 2], key=lambda: key)
    reduction = VisionZip(keep_tokens=14, contextual=4).on_features(v)
    well_formed(reduction, N, 14)
    _, size = reduction.merge(v.features)
    assert size[0].sort().values.tolist() == [1.0] * 13 + [N - 13.0]  # all to the first target


def test_visionzip_without_cls():
    v = features_view(batch=1, has_cls=False)
    reduction = VisionZip(saliency="received", keep_tokens=8, contextual=0).on_features(v)
    received = v.layers[DEPTH - 2].attention(slice(None))[0].mean(0).mean(0)
    assert torch.equal(reduction.keep, top_k(received[None], 8))
    with pytest.raises(UnsupportedError, match=r"\[CLS\]"):
        VisionZip().on_features(v)
    with pytest.raises(ValueError, match="exceeds the budget of 8"):
        VisionZip(keep_tokens=8, contextual=9).on_features(v)


def test_divprune_works_on_projected_features_and_their_directions():
    v = features_view()
    keep = DivPrune(keep_tokens=7).on_features(v).keep
    assert torch.equal(keep, greedy_order(v.projected, 7).sort(1).values)
    scaled = v.features * torch.rand(*v.features.shape[:2], 1).add(0.5)
    assert torch.equal(DivPrune(keep_tokens=7).on_features(replace(v, features=scaled)).keep, keep)
    assert DivPrune().budget(576) == 56
    assert math.isclose(DivPrune.default_ratio, 0.098)


def test_divprune_does_not_depend_on_the_order_of_the_tokens():
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shuffle[greedy_order(x[:, shuffle], 12)], greedy_order(x, 12))


def test_divprune_never_takes_a_token_twice():
    x = torch.ones(1, 9, 4)
    assert sorted(greedy_order(x, 9)[0].tolist()) == list(range(9))
    assert greedy_order(x, 3)[0].tolist() == [0, 1, 2]


def test_divprune_maximises_the_smallest_distance_step_by_step():
    x = unit(torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(5)))
    d = 1 - x[0] @ x[0].T
    order = greedy_order(x, 8)[0].tolist()
    nearest_other = d.clone().fill_diagonal_(9).amin(1)
    assert order[0] == nearest_other.argmax()
    for i in range(1, 8):
        others = [j for j in range(20) if j not in order[:i]]
        assert order[i] == max(others, key=lambda j: d[j, order[:i]].min().item())


# ---- between LLM layers ------------------------------------------------------------------------


def test_fastv_ranks_by_the_last_row_of_layer_k_minus_1():
    view, weights = decoder_view([[20], [20]])
    method = FastV(keep_tokens=6)
    assert method.after_layer == 1 and method.stages == {"decoder"}
    reduction = method.on_decoder_layer(view)
    assert torch.equal(reduction.keep, top_k(weights[:, :, 24, :20].mean(1), 6))
    assert tuple(method.decoder_layers(24)) == (1,)
    assert tuple(FastV(k=4).decoder_layers(24)) == (3,)
    assert FastV().on_decoder_layer(view).count == 10


def test_fastv_budgets_are_per_row_when_rows_differ():
    view, weights = decoder_view([[20], [8, 4], [10]])
    reduction = FastV(keep_ratio=0.5).on_decoder_layer(view)
    assert reduction.counts.tolist() == [10, 6, 5]
    last = weights[1, :, 16, :12].mean(0)  # 12 visual and 5 text tokens
    assert reduction.keep[1, :6].tolist() == top_k(last[None], 6)[0].tolist()
    assert (reduction.group[2, 10:] == -1).all()


# ---- controls ----------------------------------------------------------------------------------


def test_random_is_the_same_for_every_image_and_nested_in_the_budget():
    a = Random(keep_tokens=10).on_features(features_view(batch=3)).keep
    assert (a == a[0]).all()
    assert torch.equal(
        a[:1], Random(keep_tokens=10).on_features(features_view(batch=1, seed=9)).keep
    )
    more = Random(keep_tokens=20).on_features(features_view()).keep
    assert set(a[0].tolist()) < set(more[0].tolist())
    other = [
        tuple(Random(keep_tokens=10, seed=s).on_features(features_view()).keep[0].tolist())
        for s in range(30)
    ]
    assert len(set(other)) == 30
    assert Random(seed=-3, keep_tokens=10).on_features(features_view()).count == 10


def test_random_is_fair():
    """Over many seeds each place is kept about equally often, and halves are balanced."""
    view = features_view(batch=1, grid=(10, 10))
    kept = torch.zeros(100)
    for seed in range(1000):
        kept[Random(keep_tokens=30, seed=seed).on_features(view).keep[0]] += 1
    assert kept.min() > 230 and kept.max() < 370  # 300 expected, sd 14.5
    assert abs(kept[:50].sum() - 15000) < 600


def test_uniform_is_a_centred_stride():
    v = features_view()
    assert Uniform(keep_tokens=4).on_features(v).keep[0].tolist() == [6, 18, 30, 42]
    assert Uniform(keep_tokens=1).on_features(v).keep[0].tolist() == [24]
    assert Uniform(keep_tokens=5).on_features(v).keep[0].tolist() == [4, 14, 24, 33, 43]


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (6, 8), (24, 24), (3, 20)])
def test_pool_cells_tile_the_grid(grid):
    rows, columns = grid
    for k in range(1, rows * columns + 1):
        tiles = cells(grid, k)
        assert len(tiles) == k
        covered = torch.zeros(grid, dtype=torch.int64)
        for r, c in tiles:
            assert len(r) and len(c)
            covered[r.start : r.stop, c.start : c.stop] += 1
        assert (covered == 1).all()
        sizes = [len(r) * len(c) for r, c in tiles]
        assert max(sizes) <= 4 * rows * columns / k  # near-equal areas


def test_pool_of_a_divisor_is_average_pooling():
    v = features_view()
    reduction = Pool(keep_tokens=12).on_features(v)
    image = v.features.reshape(2, *GRID, WIDTH).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(reduction.merge(v.features)[0], pooled)
    shape = [(len(r), len(c)) for r, c in cells((24, 24), 144)]
    assert set(shape) == {(2, 2)}


def test_pool_needs_the_grid():
    v = features_view()
    part = replace(v, features=v.features[:, :40])
    with pytest.raises(UnsupportedError, match="full 6 x 8 grid and found 40"):
        Pool(keep_tokens=4).on_features(part)


@pytest.mark.parametrize("grid", [(24, 24), (16, 16), (7, 7), (16, 24), (30, 12), (5, 9)])
def test_downsample_fits_the_budget_and_keeps_the_aspect(grid):
    rows, columns = grid
    n = rows * columns
    for k in range(1, n):
        r, c = Downsample(keep_tokens=k).on_pixels(grid)
        distortion = max(r * columns / (c * rows), c * rows / (r * columns))
        assert 1 <= r <= rows and 1 <= c <= columns and r * c <= k
        assert Downsample(keep_tokens=k).budget(n, grid) == r * c
        near = [
            (a, b)
            for a in range(1, rows + 1)
            for b in range(1, columns + 1)
            if a * b <= k and max(a * columns / (b * rows), b * rows / (a * columns)) <= 1.34
        ]
        if near:
            assert distortion <= 1.34 and r * c == max(a * b for a, b in near)
    assert Downsample(keep_tokens=n).on_pixels(grid) is None


def test_downsample_examples():
    assert smaller_grid((24, 24), 144) == (12, 12)
    assert smaller_grid((24, 24), 150) == (10, 15) or math.prod(smaller_grid((24, 24), 150)) == 144
    assert Downsample(keep_tokens=192).budget(576) == Downsample(keep_tokens=192).budget(
        576, (24, 24)
    )
    assert Downsample().stages == {"pixels"}


# ---- parameters and registry -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToMe(keep_ratio=0.5, keep_tokens=3), "not both"),
        (lambda: ToMe(keep_ratio=0), r"in \(0, 1\]; got 0"),
        (lambda: ToMe(keep_tokens=0), "at least 1; got 0"),
        (lambda: ToMe(r=4, keep_ratio=0.5), "r or a budget"),
        (lambda: ToMe(r=-1), "got -1"),
        (lambda: ToMe(r=True), "got True"),
        (lambda: PiToMe(ratio=0.9, keep_tokens=4), "ratio or a budget"),
        (lambda: PiToMe(ratio=0.4), "at most half.*got 0.4"),
        (lambda: PiToMe(ratio=1.1), "got 1.1"),
        (lambda: PiToMe(energy="gauss"), "energy is .*got 'gauss'"),
        (lambda: PiToMe(metric="value"), "metric is .*got"),
        (lambda: PiToMe(margin=float("nan")), "margin is a cosine"),
        (lambda: PiToMe(margin="0.9"), "margin is a cosine"),
        (lambda: PiToMe(matching="tome"), "matching is .*got"),
        (lambda: PiToMe(first="tome"), "first is .*got"),
        (lambda: PiToMe(vision_site="end"), "vision_site is .*got"),
        (lambda: PiToMe(margin_depth=0), "margin_depth.*got 0"),
        (lambda: PiToMe(first_blocks=-1), "first_blocks.*got -1"),
        (lambda: PiToMe(skip_last=-1), "skip_last.*got -1"),
        (lambda: PiToMe.paper("llava-1.5", 64), r'known: \("llava-1.5", tokens=54\)'),
        (lambda: FastV(k=0), "at least 1; got 0"),
        (lambda: VisionZip(saliency="attention"), "got 'attention'"),
        (lambda: VisionZip(contextual=-1), "got -1"),
        (lambda: Random(seed=0.5), "got 0.5"),
        (lambda: resolve("tome", ratio=0.9), "tome: .*ratio.*parameters are keep_ratio"),
        (lambda: resolve("to-me"), "did you mean tome"),
        (lambda: resolve("PiToMee"), "did you mean pitome"),
        (lambda: resolve("Fast_V"), "did you mean fastv"),
        (lambda: resolve(ToMe(), r=3), "already has its parameters; give r to it"),
        (lambda: register(type("Other", (ToMe,), {})), "already registered"),
    ],
)
def test_bad_parameters_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_registry():
    mine = {"tome", "pitome", "fastv", "visionzip", "fastervlm", "divprune"}
    mine |= {"random", "uniform", "pool", "downsample"}
    known = vtc.methods()
    assert known == known_methods()
    assert mine <= set(known)
    assert all(cls.name == name and cls.summary and cls.__doc__ for name, cls in known.items())
    for name in mine:
        (method,) = resolve(name, keep_ratio=0.5)
        assert type(method) is known[name] and method.keep_ratio == 0.5
        assert hash(method) == hash(replace(method))
        assert str(method) == f"{name}(keep_ratio=0.5)"
        assert method.stages <= {"pixels", "vision", "features", "decoder"}
