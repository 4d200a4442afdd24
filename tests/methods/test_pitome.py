# SPDX-License-Identifier: Apache-2.0
"""`pitome` by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic_views import DEPTH, N, encode, vision_view

from vtc.errors import UnsupportedError
from vtc.kernels import similarity_reduce
from vtc.methods._common import unit
from vtc.methods._matching import match_parity
from vtc.methods.pitome import BACKBONES, PiToMe, match_energy
from vtc.reduction import Reduction

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


def test_pitome_metric_and_site_change_what_is_compared():
    v = vision_view(layer=1)
    by_key = PiToMe(keep_ratio=0.5).on_vision_layer(v)
    by_hidden = PiToMe(keep_ratio=0.5, metric="hidden").on_vision_layer(v)
    assert not torch.equal(by_key.group, by_hidden.group)
    other = replace(v, x=torch.randn_like(v.x))
    assert torch.equal(PiToMe(keep_ratio=0.5).on_vision_layer(other).group, by_key.group)
