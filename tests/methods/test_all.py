# SPDX-License-Identifier: Apache-2.0
"""The first methods on synthetic views: budgets, schedules, choices, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic_views import (
    BUDGETS,
    DEPTH,
    GRID,
    N,
    decoder_view,
    encode,
    features_view,
    projections,
    vision_view,
    well_formed,
)

from vtc.methods.divprune import DivPrune
from vtc.methods.downsample import Downsample
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fastv import FastV
from vtc.methods.pitome import BACKBONES, PiToMe
from vtc.methods.pool import Pool
from vtc.methods.random import Random
from vtc.methods.tome import ToMe
from vtc.methods.uniform import Uniform
from vtc.methods.visionzip import VisionZip
from vtc.registry import register, resolve
from vtc.views.projections import Projections
from vtc.views.vision import VisionView

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

    class SequenceView:
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
        SequenceView.row = projections(2, N).attention(slice(0, 1))[:, :, 0]
        SequenceView.keys = v.key(-2)
    for field in fields:
        setattr(SequenceView, field, getattr(v, field))

    def step(x):
        reduction = run(SequenceView(x))
        return reduction.merge(x)[0], reduction.group

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for mine, theirs in zip(compiled(x), step(x), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", VISION)
def test_no_block_merges_more_than_half_of_what_it_finds(name):
    """Even where the blocks before it did not do their part."""
    late = VISION[name](keep_tokens=3).on_vision_layer(vision_view(layer=4))
    assert late.count == 1 + N // 2


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
