# SPDX-License-Identifier: Apache-2.0
"""Fate of each token: stages and scores of a report against what else is known of the run."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import mini
import mini_llava
import pytest
import torch
from llava_cases import METHODS, made
from torch import Tensor

import vtc
from vtc.benchmarks.support.mini_families import EVERY, build, prompt
from vtc.engine.vision.reductions import behind_prefix
from vtc.method import Method, Scorer
from vtc.methods._common import into_chosen
from vtc.methods.divprune import DivPrune
from vtc.methods.fastv import FastV
from vtc.methods.pitome import PiToMe
from vtc.methods.prefixkv import PrefixKV
from vtc.methods.visionzip import VisionZip
from vtc.reduction import Reduction
from vtc.transformers_contract import cache_left, giving

UNEVEN = dict(images_per_row=[1, 2, 1], pad="left")
SCORERS = [m for m in METHODS if issubclass(vtc.methods()[m], Scorer)]


@torch.no_grad()
def run(model: Any, method: Any, inputs: dict[str, Tensor]) -> vtc.Report:
    with vtc.compressing(model, method) as session:
        model(**inputs, use_cache=True)
        return session.report()


def counted(report: vtc.Report, images: list[int], what: Any) -> list[float]:
    """For each LLM layer the mean over rows of images of what(stages of an image, layer)."""
    depth = len(report.tokens_per_layer)
    stages = [report.trace.stages(i) for i in range(sum(images))]
    return [sum(what(s, i) for s in stages) / len(images) for i in range(depth)]


def ran_on(stages: list[Any], layer: int) -> int:
    name = f"LLM layer {layer}" if layer else "before the LLM"
    return next(int(s.kept.sum()) for s in stages if s.label == name)


def cached(stages: list[Any], layer: int) -> int:
    """Tokens in the KV cache of a layer: what its attention saw, unless some were evicted."""
    for name in ("KV cache of", "attention of"):
        for stage in stages:
            if stage.label == f"{name} LLM layer {layer}":
                return int(stage.kept.sum())
    return ran_on(stages, layer)


@pytest.mark.parametrize("method", METHODS)
def test_stages_are_what_ran(method: str) -> None:
    """Every method on a padded batch of rows with one and two images."""
    model, inputs = mini_llava.build(), mini_llava.prompt(**UNEVEN)
    report = run(model, made(method), inputs)
    images = UNEVEN["images_per_row"]
    assert counted(report, images, ran_on) == pytest.approx(report.tokens_per_layer)
    held = counted(report, images, cached)
    assert sum(held) / len(held) == pytest.approx(report.kv_tokens)
    for i, kept in enumerate(report.kept):
        end = report.stage(i)
        assert end.kept.nonzero()[:, 0].tolist() == kept.tolist()
        assert ((end.share > 0) <= end.kept).all()
        labels = [label for label, _ in report.stages(i)]
        assert len(labels) == len(set(labels))
        assert all(int(report.stage(i, x).kept.sum()) == n for x, n in report.stages(i))
        for stage in report.trace.stages(i):  # tokens lie with one that is there
            owner = stage.owner[(stage.owner >= 0) & (stage.owner < len(stage.owner))]
            assert stage.kept[owner].all()
    assert report.stages(), "nothing changed: no teeth"


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_stages_do_not_depend_on_batch_mates(method: str) -> None:
    model, inputs = mini_llava.build(), mini_llava.prompt(**UNEVEN)
    together = run(model, made(method), inputs)
    row = {k: v[2:] for k, v in inputs.items() if k != "pixel_values"}
    row = {k: v[:, inputs["attention_mask"][2].bool()] for k, v in row.items()}
    alone = run(model, made(method), {**row, "pixel_values": inputs["pixel_values"][3:]})
    assert alone.stages(0) == together.stages(3)
    assert torch.equal(alone.stage(0).owner, together.stage(3).owner)
    scores = alone.scores(0), together.scores(3)
    assert (scores[0] is None) == (scores[1] is None)
    if scores[0] is not None:
        close = torch.allclose(*scores, equal_nan=True, atol=1e-4, rtol=1e-4)
        assert close or torch.equal(*(x.argsort(stable=True) for x in scores))  # MustDrop: ranks


@pytest.mark.parametrize("family", EVERY)
def test_stages_on_every_family(family: str) -> None:
    """In front of the LLM, inside it and in its cache, on images of different sizes."""
    sizes = EVERY[family].sizes
    rows = [[sizes[0]], [sizes[1], sizes[2]]]
    inputs = prompt(family, rows, pad="left")
    chain = vtc.chain(DivPrune(keep_ratio=0.6), FastV(keep_ratio=0.4), PrefixKV(keep_ratio=0.3))
    report = run(build(family), chain, inputs)
    images = [sum(len(EVERY[family].count(s)) for s in row) for row in rows]
    assert counted(report, images, ran_on) == pytest.approx(report.tokens_per_layer)
    held = counted(report, images, cached)
    if family != "Gemma 3":  # which has a sliding window besides
        assert sum(held) / len(held) == pytest.approx(report.kv_tokens)
    for i, kept in enumerate(report.kept):
        assert report.stage(i).kept.nonzero()[:, 0].tolist() == kept.tolist()
        before, behind = report.stage(i, 0).kept, report.stage(i, 2)
        assert int(behind.kept.sum()) <= int(before.sum()) < len(before)  # FastV: of all images
        assert torch.equal(behind.scores.isnan(), ~before)  # of FastV, for all that were there
        dropped = behind.scores[before & ~behind.kept]
        assert (behind.scores[behind.kept][:, None] >= dropped).all()
    assert any(len(report.stages(i)) > 2 for i in range(len(report.kept)))


@pytest.mark.parametrize("method", SCORERS)
def test_the_best_scores_are_kept(method: str) -> None:
    report = run(mini_llava.build(), made(method), mini_llava.prompt(1, batch=2))
    for i, kept in enumerate(report.kept):
        scores = report.scores(i)
        best = scores.argsort(descending=True, stable=True)[: len(kept)]
        assert sorted(best.tolist()) == kept.tolist()
        assert scores.isfinite().all() and not scores.requires_grad


RANKING = ["visionzip", "prumerge", "vispruner", "holov", "globalcom2", "sparsevlm", "vscan"]
RANKING += ["tokencorr", "pyramiddrop", "diprune", "mob", "vidcom2", "prefixkv", "zipvl"]


@pytest.mark.parametrize("method", RANKING)
def test_methods_that_do_more_than_rank(method: str) -> None:
    """They keep others too, but those with higher scores first."""
    report = run(mini_llava.build(), made(method), mini_llava.prompt(1, batch=1))
    label = report.stages()[0][0]
    stage = report.stage(0, label)
    rank = stage.scores.argsort().argsort().float()
    assert stage.scores.isfinite().all()
    assert rank[stage.kept].mean() > rank[~stage.kept].mean() + 3


def test_a_choice_is_no_ranking() -> None:
    assert run(mini_llava.build(), made("dart"), mini_llava.prompt(1, batch=1)).scores() is None


def test_scores_of_crops_are_those_of_each_region() -> None:
    rows = [[(32, 64)]]
    report = run(build("LLaVA-NeXT"), made("fastervlm"), prompt("LLaVA-NeXT", rows))
    (layout,) = report.layouts
    scores, kept = report.scores(), report.stage().kept
    assert scores.isfinite().all()
    for region in layout.regions():
        here = scores[region.patches]
        count = int(kept[region.patches].sum())
        best = here.argsort(descending=True, stable=True)[:count]
        assert kept[region.patches][best].all()


@dataclass(frozen=True, kw_only=True)
class Loudest(Method):
    """Keeps the 10 largest patches behind the first block, the 6 largest behind the second."""

    name = "test-loudest"
    seen: list[tuple[Tensor, Tensor]]

    def on_vision_layer(self, v: Any) -> Reduction | None:
        if v.layer > 1:
            return None
        scores = v.x[:, v.prefix :].norm(dim=-1)
        self.seen.append((v.index, scores))
        return behind_prefix(Reduction.from_scores(scores, (10, 6)[v.layer]), v.prefix)


def test_scores_inside_the_encoder_of_crops() -> None:
    """In the order of the packed image, of every patch that had not left before."""
    seen: list[tuple[Tensor, Tensor]] = []
    inputs = prompt("LLaVA-NeXT", [[(32, 64)]])
    report = run(build("LLaVA-NeXT"), Loudest(seen=seen), inputs)
    (layout,) = report.layouts
    for block, (index, scores) in enumerate(seen):
        want = torch.full((3, 16), torch.nan).scatter(1, index, scores)
        got = report.scores(0, f"encoder block {block}")
        assert torch.equal(got.nan_to_num(-1), want[layout.crop, layout.place].nan_to_num(-1))
        assert got.isnan().any() == (block == 1)


def test_scores_of_a_place_are_those_of_the_last_that_ranked_there() -> None:
    """Two methods behind the encoder, the second of which only chooses."""
    model, inputs = mini_llava.build(), mini_llava.prompt(1, batch=1)
    one = run(model, made("fastervlm", keep=12), inputs)
    two = run(model, vtc.chain(made("fastervlm", keep=12), DivPrune(keep_tokens=5)), inputs)
    assert two.stages() == [("before the LLM", 5)]
    assert torch.equal(two.scores(0), one.scores(0))


def test_scores_before_a_layer_are_those_of_the_step_before() -> None:
    model, inputs = mini_llava.build(), mini_llava.prompt(1, batch=1)
    report = run(model, vtc.chain(made("fastervlm", keep=12), FastV(keep_tokens=5)), inputs)
    assert torch.equal(report.scores(0, 1), report.scores(0, "before the LLM"))
    late = report.scores(0)
    assert torch.equal(late.isnan(), ~report.stage(0, 1).kept)
    assert int(late.isfinite().sum()) == 12
    assert run(model, DivPrune(keep_tokens=5), inputs).scores() is None


def test_groups_are_those_of_the_encoder() -> None:
    """Merging in every block, and then once more behind the encoder."""
    chain = vtc.chain(PiToMe(keep_tokens=12), VisionZip(keep_tokens=6))
    report = run(mini_llava.build(), chain, mini_llava.prompt(**UNEVEN))
    reduction: Any = report.reduction
    for i in range(4):
        want = reduction.keep[i].gather(0, reduction.group[i])
        assert torch.equal(report.stage(i).owner, want)
        assert report.stages(i)[-1] == ("before the LLM", 6)
        assert [n for label, n in report.stages(i) if label.startswith("encoder")][-1] == 12


def test_groups_of_crops_are_those_of_the_encoder() -> None:
    """Inside a crop a patch lies with the survivor that the encoder folded it into."""
    model, rows = build("LLaVA-NeXT"), [[(32, 48)], [(32, 64), (32, 32)]]
    inputs = prompt("LLaVA-NeXT", rows, pad="left")
    with torch.no_grad(), vtc.compressing(model, PiToMe(keep_ratio=0.4)) as session:
        model(**inputs)
        report, history = session.report(), session.vision.state.history
    first, cut_off = 0, []
    for i, layout in enumerate(report.layouts):
        owner = report.stage(i).owner
        state: Any = session.vision.state.reduction
        for p in range(len(owner)):
            row = first + int(layout.crop[p])
            slot = int(state.group[row, layout.place[p]])
            place = int(state.keep[row, slot])
            there = (layout.crop == layout.crop[p]) & (layout.place == place)
            assert owner[p] == (there.nonzero()[0, 0] if there.any() else -1)
        cut_off.append(bool((owner == -1).any()))  # folded into what is padding
        first += 1 + layout.crops[0] * layout.crops[1]
    assert any(cut_off) and not cut_off[1] and history.blocks == 4


def test_an_encoder_alone() -> None:
    encoder = mini.ENCODERS["hf-clip"]()
    with torch.no_grad(), vtc.compressing(encoder, PiToMe(keep_ratio=0.5)) as session:
        encoder(pixel_values=mini.images(2))
        report = session.report()
    counts = [n - 1 for n in report.tokens_per_layer]
    assert [n for _, n in report.stages(1)] == counts[: len(report.stages(1))]
    for block, n in enumerate(counts):
        assert int(report.stage(1, block).kept.sum()) == n
    assert report.stage(1).kept.nonzero()[:, 0].tolist() == report.kept[1].tolist()


def test_images_encoded_once_and_in_another_order() -> None:
    """Features made before, given for several prompts: each image's own steps are found."""
    model, inputs = mini_llava.build(), mini_llava.prompt(1, batch=3)
    with torch.no_grad(), vtc.compressing(model, VisionZip(keep_tokens=6)) as session:
        model(**inputs)
        apart = [session.report().stage(i).owner for i in range(3)]
        encoded = model.get_image_features(inputs["pixel_values"][:2])
        order = [1, 0, 1]
        given = type(encoded)(pooler_output=[encoded.pooler_output[i] for i in order])
        text = {k: v for k, v in inputs.items() if k != "pixel_values"}
        model(**text, mm_encoder_outputs={"image": given})
        report = session.report()
        got = [report.stage(i).owner for i in range(3)]
        model.get_image_features(inputs["pixel_values"][2:])  # of another image
        later = session.report().stage(0)
    assert not torch.equal(apart[0], apart[1]), "no teeth"
    for i, place in enumerate(order):
        assert torch.equal(got[i], apart[place])
    assert torch.equal(later.kept, report.stage(0).kept)
    assert not (later.owner >= 0)[~later.kept].any(), "where the others went is not known"


@dataclass(frozen=True, kw_only=True)
class FirstFour(Method):
    """Keeps the same patches of every image, and folds the others into those most like them."""

    merges = True

    def on_features(self, v: Any) -> Reduction:
        index = torch.arange(v.count).expand(len(v.features), -1)
        return Reduction.from_merge(into_chosen(v.features, index < 4), 4)


def test_images_that_keep_the_same_patches_are_told_apart_by_their_order() -> None:
    report = run(mini_llava.build(), FirstFour(), mini_llava.prompt(**UNEVEN))
    reduction: Any = report.reduction
    assert not torch.equal(reduction.group[0], reduction.group[1]), "no teeth"
    for i in range(4):
        want = reduction.keep[i].gather(0, reduction.group[i])
        assert torch.equal(report.stage(i).owner, want)


def test_a_second_turn_is_counted_from_its_own_prompt() -> None:
    model, method = mini_llava.build(), vtc.chain(FastV(keep_tokens=8), PrefixKV(keep_tokens=4))
    first, second = (mini_llava.prompt(1, batch=2, seed=s) for s in (0, 1))
    with torch.no_grad(), vtc.compressing(model, method) as session:
        cache = cache_left(model(**first, use_cache=True))
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        model(**{**second, "attention_mask": mask}, **giving(model, cache), use_cache=True)
        report = session.report()
    for i in range(2):
        assert report.stages(i)[0] == ("LLM layer 2", 8)
        held = [report.stage(i, label) for label, _ in report.stages(i) if "KV" in label]
        assert held and all((s.kept <= report.stage(i, 0).kept).all() for s in held)
        assert any(s.scores is not None and s.scores.isfinite().any() for s in held)


def test_labels_and_layers_that_are_not_there() -> None:
    report = run(mini_llava.build(), FastV(keep_tokens=4), mini_llava.prompt(1, batch=1))
    with pytest.raises(ValueError, match='the steps are "LLM layer 2"'):
        report.scores(0, "before lunch")
    with pytest.raises(ValueError, match="no LLM layer 5: there are 5"):
        report.stage(0, 5)
    with pytest.raises(ValueError, match="no image 1"):
        report.stages(1)
    assert "trace" not in report.to_dict()


def test_nothing_outlives_the_next_forward() -> None:
    model, inputs = mini_llava.build(), mini_llava.prompt(1, batch=1)
    chain = vtc.chain(VisionZip(keep_tokens=8), FastV(keep_tokens=4))
    with vtc.compressing(model, chain) as session:
        model(**inputs)  # with gradients
        record, state = session.record, session.vision.state
        held = [step.keep for _, step in state.steps]
        held += [x for c in record.choices for x in (c.image, c.reduction.scores)]
        assert all(not x.requires_grad for x in held)
        gone = [weakref.ref(x) for x in held]
        del held, record, state
        with torch.no_grad():
            model(**inputs)
        gc.collect()
        assert gone and all(ref() is None for ref in gone)
