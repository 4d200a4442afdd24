# SPDX-License-Identifier: Apache-2.0
"""GlobalCom2: published values, golden files, and a loop reference on mini models with crops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import mini_anyres as mini
import mini_llava
import mini_video
import pytest
import torch
from golden_files import cases, load
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

import vtc
from vtc.adapters.llava_next import crop_sites
from vtc.engine.vision.crops import layout_of
from vtc.methods.globalcom2 import GlobalCom2, crop_ratios, mix, region_sums

SIZES = [mini.SQUARE, mini.WIDE, mini.TALL, mini.TINY, mini.SLIVER, mini.LARGE]


def test_allocation_of_the_specification():
    """Region sums [100, 120, 90, 110], R = .25, tau = 10, computed in double precision."""
    sums = torch.tensor([100.0, 120, 90, 110], dtype=torch.float64)
    got = crop_ratios(sums, 0.25, 10.0)
    want = torch.tensor([0.2093, 0.3485, 0.1955, 0.2467], dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)
    assert got.mean().item() == pytest.approx(0.25)
    torch.testing.assert_close(
        GlobalCom2().ratios(sums, 0.9).max(), torch.tensor(1.0).double()
    )  # .9 (1 + .6439 - .25) is clipped
    equal = GlobalCom2().ratios(torch.full((6,), -3.0), 0.25)
    torch.testing.assert_close(equal, torch.full((6,), 0.25))


def test_softmax_scores_are_standardised():
    """Region sums of probabilities differ by little; standardised they decide all the same."""
    sums = torch.tensor([0.24, 0.26, 0.25, 0.25])
    got = GlobalCom2(score="softmax").ratios(sums, 0.25)
    z = (sums - 0.25) / math.sqrt((2 * 0.01**2) / 4)
    torch.testing.assert_close(got, 0.25 * (1 + z.softmax(0) - 0.25), atol=1e-4, rtol=1e-4)
    flat = GlobalCom2(score="softmax", temperature=1e6).ratios(sums, 0.25)
    torch.testing.assert_close(flat, torch.full((4,), 0.25))


def test_regions_take_the_remainder():
    cells = torch.arange(35.0).reshape(5, 7)
    want = [cells[:2, :2], cells[:2, 2:4], cells[:2, 4:], cells[2:, :2], cells[2:, 2:4]]
    want = torch.stack([w.sum() for w in [*want, cells[2:, 4:]]])
    torch.testing.assert_close(region_sums(cells, (2, 3)), want)
    assert region_sums(torch.ones(2, 2), (1, 3)).sum() == 4


def test_mix_is_of_unit_vectors():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([10.0, 0.0])
    torch.testing.assert_close(mix(a, b, 0.5), torch.tensor([0.8, 0.4]))
    torch.testing.assert_close(mix(a, b, 0.0), torch.tensor([1.0, 0.0]))


def published_layout(side: int, width: int, height: int, columns: int, rows: int):
    """Layout of an image in rows x columns crops, packed by LLaVA-NeXT's own function."""
    edge = 14 * side
    base = object.__new__(LlavaNextModel)
    base.__dict__["config"] = SimpleNamespace(
        image_grid_pinpoints=[[edge * rows, edge * columns]],
        vision_config=SimpleNamespace(image_size=edge, patch_size=14),
        vision_feature_select_strategy="default",
    )
    return layout_of(crop_sites(base), (height, width), 1 + rows * columns, {})


@pytest.mark.parametrize("path", cases("globalcom2_*.npz", 3))
def test_golden(path):
    data = load(path)
    names = ("side", "image_width", "image_height", "grid_width", "grid_height")
    layout = published_layout(*(int(data[name]) for name in names))
    ratio = float(data["retention_ratio"])
    method = GlobalCom2(
        keep_ratio=ratio, rounding="published", temperature=float(data["temperature"])
    )
    cls = data["cls_scores"]
    side, n = int(data["side"]), layout.thumbnail
    sums = region_sums(cls[0].reshape(side, side), layout.crops)
    torch.testing.assert_close(method.ratios(sums, ratio), data["crop_ratios"].float())
    scores = cls[layout.crop, layout.place]
    plan = method.plan(scores, layout, torch.arange(len(scores)), 0, ratio)
    (first, ranks, count), *crops = plan
    best = ranks.topk(count)
    assert first[best.indices].tolist() == data["thumbnail_kept"].tolist()
    kept = set()
    for here, ranks, count in crops:
        chosen = here[ranks.topk(count).indices]
        assert (chosen >= n).all()
        kept |= {(int(layout.crop[i]), int(layout.place[i])) for i in chosen}
    want = {tuple(pair) for pair in data["crop_sequence"].tolist()} - {(-1, -1)}
    assert kept == want


def cosine_scores(crops: torch.Tensor) -> list[list[float]]:
    """-cos to the mean, one crop (N, C) after the other."""
    out = []
    for x in crops:
        mean = x.mean(0)
        out.append([-float(p @ mean / (p.norm() * mean.norm())) for p in x])
    return out


def reference(model, image: torch.Tensor, size: tuple[int, int], ratio: float | None, k: int):
    """Kept (crop, patch) pairs by loops over the pixels of one image (crops, 3, S, S).

    Args:
        ratio: R of the published rounding; None to share out exactly k.
    """
    rows, columns = mini.grid_of(size)
    n, side = 1 + rows * columns, mini.GRID
    tower = model.model.vision_tower
    # Logits of [CLS] in the last block: its attention up to a constant of each head.
    stored = {}
    attn = tower.encoder.layers[-1].self_attn
    handles = [
        p.register_forward_hook(lambda m, a, o, name=name: stored.update({name: o}))
        for name, p in (("q", attn.q_proj), ("k", attn.k_proj))
    ]
    tower(image[:n])
    for handle in handles:
        handle.remove()
    heads, d = 2, 16
    logits = torch.zeros(n, side * side)
    for c in range(n):
        for h in range(heads):
            q = stored["q"][c, 0, h * d : (h + 1) * d]
            for j in range(side * side):
                key = stored["k"][c, j + 1, h * d : (h + 1) * d]
                logits[c, j] += (q @ key) / math.sqrt(d) / heads
    return choose(logits.double(), size, (rows, columns), ratio, k)


def choose(logits, size, crops, ratio, k):
    """The allocation and the ranking by loops; see `reference`."""
    (rows, columns), side = crops, mini.GRID
    y, x = mini.canvas_of(size)
    inner = (y.stop - y.start, x.stop - x.start)
    total = side**2 + inner[0] * inner[1]
    base = k / total if ratio is None else ratio
    sums = [0.0] * (rows * columns)
    for r in range(side):
        for c in range(side):
            at = (min(r // (side // rows), rows - 1), min(c // (side // columns), columns - 1))
            sums[at[0] * columns + at[1]] += float(logits[0, r * side + c])
    top = max(sums)
    weights = [math.exp((s - top) / 10) for s in sums]
    scales = [min(1.0, base * (1 + w / sum(weights) - 1 / (rows * columns))) for w in weights]

    def bilinear(r: int, c: int) -> float:
        """The thumbnail's score at a patch of the inner canvas."""
        parts = []
        for place, here, cells in ((r, inner[0], side), (c, inner[1], side)):
            at = max((place + 0.5) * cells / here - 0.5, 0.0)
            low = min(int(at), cells - 1)
            parts.append((low, min(low + 1, cells - 1), at - low))
        (a, b, u), (p, q, w) = parts
        s = logits[0].reshape(side, side)
        up = s[a, p] * (1 - w) + s[a, q] * w
        down = s[b, p] * (1 - w) + s[b, q] * w
        return float(up * (1 - u) + down * u)

    patches: dict[int, list[tuple[int, float, float]]] = {j: [] for j in range(rows * columns)}
    for r in range(inner[0]):
        for c in range(inner[1]):
            full = (r + y.start, c + x.start)
            crop = full[0] // side * columns + full[1] // side
            place = full[0] % side * side + full[1] % side
            patches[crop].append((place, bilinear(r, c), float(logits[crop + 1, place])))
    sizes = [len(patches[j]) for j in range(rows * columns)]
    wanted = [side**2 * base, *[n * s for n, s in zip(sizes, scales, strict=True)]]
    if ratio is not None:
        counts = [int(w) for w in wanted]
    else:  # largest remainder; no cap is reached in these tests
        exact = [w * k / sum(wanted) for w in wanted]
        counts = [int(w) for w in exact]
        order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in order[: k - sum(counts)]:
            counts[i] += 1
    best = sorted(range(side**2), key=lambda i: -float(logits[0, i]))[: counts[0]]
    kept = {(0, i) for i in best}
    for j, members in patches.items():
        norms = [math.sqrt(sum(m[i] ** 2 for m in members)) for i in (1, 2)]
        ranked = sorted(members, key=lambda m: -(m[1] / norms[0] + m[2] / norms[1]))
        kept |= {(j + 1, m[0]) for m in ranked[: counts[j + 1]]}
    return kept


def kept_pairs(report) -> list[set[tuple[int, int]]]:
    return [
        {(int(layout.crop[i]), int(layout.place[i])) for i in kept}
        for kept, layout in zip(report.kept, report.layouts, strict=True)
    ]


@pytest.mark.parametrize("published", [False, True])
@torch.no_grad()
def test_as_the_loops_do(published: bool):
    """Several images per row, rows of different lengths, padded crops."""
    model = mini.build("next")
    rows = [SIZES[:3], SIZES[3:]]
    inputs = mini.prompt(rows, pad="left", between=0)
    rounding = "published" if published else "exact"
    vtc.wrap(model, "globalcom2", keep_ratio=0.25, rounding=rounding)
    model(**inputs)
    report = model.vtc.report()
    got = kept_pairs(report)
    vtc.unwrap(model)
    for i, size in enumerate(SIZES):
        k = round(0.25 * mini.patches_of(size))
        image = inputs["pixel_values"][i]
        want = reference(model, image, size, 0.25 if published else None, k)
        assert got[i] == want, size
        assert published or len(want) == k
    assert (report.asked is None) == published


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("options", [{}, {"score": "softmax"}, {"geometry": "exact"}])
@torch.no_grad()
def test_budget_is_met_exactly(tokens: int, options: dict):
    model = mini.build("next")
    inputs = mini.prompt([[size] for size in SIZES], pad="left")
    vtc.wrap(model, "globalcom2", keep_tokens=tokens, **options)
    model(**inputs)
    report = model.vtc.report()
    want = [min(tokens, mini.patches_of(size)) for size in SIZES]
    assert [len(k) for k in report.kept] == want
    assert report.asked == pytest.approx(sum(want) / len(want))


@torch.no_grad()
def test_without_cls_the_cosine_ranks():
    """SigLIP, one crop and one of several: -cos to the mean of each crop."""
    model = mini.build("onevision")
    with pytest.raises(vtc.UnsupportedError, match=r"\[CLS\]"):
        vtc.wrap(model, "globalcom2")
    sizes = [mini.TALL, mini.TINY]
    inputs = mini.prompt([sizes], "onevision")
    vtc.wrap(model, "globalcom2", saliency="cosine", keep_ratio=0.3)
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda m, args: seen.append(args[0])
    )
    model(**inputs)
    hook.remove()
    got = kept_pairs(model.vtc.report())
    start = 0
    for i, size in enumerate(sizes):
        crops, (y, x) = mini.grid_of(size), mini.canvas_of(size)
        here = seen[0][start : start + 1 + math.prod(crops)]
        start += len(here)
        scores = torch.zeros(len(here), mini.PATCHES)
        for c, features in enumerate(here):
            inside = []
            for p in range(mini.PATCHES):
                r = (c - 1) // crops[1] * mini.GRID + p // mini.GRID
                col = (c - 1) % crops[1] * mini.GRID + p % mini.GRID
                if c == 0 or (y.start <= r < y.stop and x.start <= col < x.stop):
                    inside.append(p)
            mean = features[inside].mean(0)
            for p in inside:
                cosine = features[p] @ mean / features[p].norm() / mean.norm()
                scores[c, p] = -cosine
        k = round(0.3 * mini.patches_of(size, "onevision"))
        assert got[i] == choose(scores.double(), size, crops, None, k)


@torch.no_grad()
def test_resampled_canvas():
    """Thumbnail and blended patches share the budget; nothing is lost."""
    model = mini.build("onevision")
    inputs = mini.prompt([[mini.LARGE]], "onevision")
    vtc.wrap(model, "globalcom2", saliency="cosine", keep_tokens=20)
    model(**inputs)
    report = model.vtc.report()
    assert report.layouts[0].resampled
    assert len(report.kept[0]) == 20 and report.final_tokens == 20
    assert 0 < (report.kept[0] < mini.PATCHES).sum() < 20


@torch.no_grad()
def test_single_view_is_top_k_of_cls():
    model, inputs = mini_llava.build("clip"), mini_llava.prompt(1, batch=2)
    vtc.wrap(model, "globalcom2", keep_tokens=5)
    model(**inputs)
    kept = [k.tolist() for k in model.vtc.report().kept]
    vtc.unwrap(model)
    model.set_attn_implementation("eager")
    maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
    logs = maps[:, :, 0, 1:].log()  # logits up to a constant of each head
    assert kept == [sorted(row.topk(5).indices.tolist()) for row in logs.mean(1)]


def test_refusals_and_presets():
    for options, message in (
        ({"score": "max"}, "score is .*got"),
        ({"saliency": "received"}, "saliency is .*got"),
        ({"temperature": 0.0}, "temperature is .*above 0"),
        ({"alpha": 1.5}, "alpha is a weight"),
        ({"saliency": "cosine", "score": "softmax"}, "leave score out"),
        ({"rounding": "published", "keep_tokens": 5}, "give keep_ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            GlobalCom2(**options)
    published = GlobalCom2.paper("llava-next", tokens=720)
    assert published.keep_ratio == 0.25 and not published.has_budget
    assert published.counts(0, 0.25, 576, [0.3], [500]) == [144, 150]


@torch.no_grad()
def test_published_rounding_of_everything_and_of_videos():
    model, inputs = mini.build("next"), mini.prompt([[SIZES[0]]])
    want = model(**inputs).logits
    with vtc.compressing(model, "globalcom2", keep_ratio=1.0, rounding="published"):
        assert torch.equal(model(**inputs).logits, want)
    video = mini_video.build("onevision")
    inputs = mini_video.prompt([[mini_video.Clip(3)]], "onevision")
    own = {"saliency": "cosine", "keep_ratio": 0.4}
    for rounding, kept in (("published", 3 * int(4 * 0.4)), ("exact", round(12 * 0.4))):
        with vtc.compressing(video, "globalcom2", rounding=rounding, **own) as session:
            video(**inputs)
            assert session.report().final_tokens == kept
