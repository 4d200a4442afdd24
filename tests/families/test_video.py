# SPDX-License-Identifier: Apache-2.0
"""Videos of LLaVA-OneVision, LLaVA-NeXT-Video and Qwen-VL; evs and vidcom2; the invariants."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from inspect import signature
from typing import Any

import mini_llava
import mini_video as mini
import pytest
import torch
import torch.nn.functional as F
from invariants import dropped_is_masked
from mini_video import FLAT, LONG, SHORT, Clip
from snapshot import snapshot
from torch import Tensor
from video_views import Look, LookJoint, looked

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support.masked_oracle import compare, logits_and_steps, masked, recording
from vtc.engine.llm.prompt import in_prompt_order, split_lengths
from vtc.methods.evs import EVS
from vtc.report.flops import decoder_flops
from vtc.transformers_contract import cache_left, giving

HALF, STEPS = Fraction(1, 2), 3
CHOOSING = {"features", "decoder"}
IMAGES = {"onevision": (40, 60), "next-video": (40, 60)}
QUICK = ("divprune", "visionzip", "pool", "evs", "vidcom2", "mustdrop", "fastv", "prefixkv")
"""Methods of every kind, for the invariants."""
FAST = {"divprune-qwen3", "evs-onevision", "vidcom2-qwen2.5", "mustdrop-next-video", "fastv-qwen2"}
FAST |= {"pool-qwen3", "prefixkv-onevision"}
"""Pairs that are not marked slow."""


def cases() -> list[Any]:
    pairs = [(m, f) for m in QUICK for f in mini.FAMILIES]
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(m, f, id=f"{m}-{f}", marks=marks[f"{m}-{f}" in FAST]) for m, f in pairs]


def made(method: str, keep: Fraction | int | None = HALF) -> vtc.Method:
    """The method with a budget, and with its substitutes for [CLS] and for the encoder's blocks."""
    chosen = seeded(method, keep, 0)
    return replace(chosen, **chosen.without_cls, **chosen.outside_encoder)


def takes_budget(method: str) -> bool:
    try:
        return made(method).has_budget
    except ValueError:
        return False


def usable(method: str) -> bool:
    """Acts behind the encoder, by a budget, without [CLS]."""
    chosen = made(method, None)
    inside = bool(chosen.stages & {"pixels", "vision"})
    return takes_budget(method) and not inside and "cls" not in chosen.needs


METHODS = [m for m in sorted(vtc.methods()) if usable(m)]


def image(family: str) -> tuple[int, int]:
    return IMAGES.get(family, (3, 4))


def inputs_for(family: str, method: str) -> dict[str, tuple[list[list[Any]], dict[str, Any]]]:
    """Several videos, rows that differ, an image beside a video; padding on each side."""
    other = FLAT if mini.qwen(family) else SHORT
    still: list[Any] = [] if method == "evs" else [image(family)]
    return {
        "left": ([[SHORT, other], [*still, SHORT]], {"pad": "left"}),
        "right": ([[SHORT, *still], [other]], {"pad": "right"}),
    }


def result(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, list[int]]:
    return logits_and_steps(model, inputs, STEPS)


# ---- invariants --------------------------------------------------------------------------------


@pytest.mark.parametrize("method, family", cases())
@torch.no_grad()
def test_dropped_is_masked(method: str, family: str) -> None:
    """Invariants 3, 4 and 5: prefill and greedy steps, SDPA and eager, images beside videos."""
    chosen = made(method)
    drops = bool(chosen.stages & CHOOSING)
    for n, (name, (rows, how)) in enumerate(inputs_for(family, method).items()):
        model = mini.build(family, "eager" if n % 2 else "sdpa")
        inputs = mini.prompt(rows, family, **how)
        stock = result(model, inputs)
        vtc.wrap(model, chosen)
        alive = dropped_is_masked(model, result, inputs, stock, drops, name)
        model(**inputs)
        check_report(model.vtc.report(), chosen, rows, family)
        if drops:
            separators = model.vtc.record.separators
            kept = (alive[len(alive) - 1] & is_visual(inputs)).sum(1)
            kept = kept if separators is None else kept - separators
            counts = [[mini.tokens(unit, family) for unit in row] for row in rows]
            assert kept.tolist() == [sum(chosen.budget(n) for n in row) for row in counts]


def is_visual(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["input_ids"] == mini.IMAGE) | (inputs["input_ids"] == mini.VIDEO)


def check_report(report: Any, method: vtc.Method, rows: list[list[Any]], family: str) -> None:
    """Asked == kept == reported, for each video and image in the order of the prompt."""
    flat = [unit for row in rows for unit in row]
    counts = [mini.tokens(unit, family) for unit in flat]
    assert report.visual_tokens == pytest.approx(sum(counts) / len(rows))
    assert report.kinds == ["video" if isinstance(unit, Clip) else "image" for unit in flat]
    clips = [unit for unit in flat if isinstance(unit, Clip)]
    assert [layout.grids for layout in report.videos] == [(c.grid,) * c.frames for c in clips]
    if family == "onevision":
        assert report.separators >= len(clips) / len(rows)
    asked = [method.budget(n) for n in counts]
    assert report.asked == pytest.approx(sum(asked) / len(rows))
    if not method.stages & CHOOSING:
        assert report.kv_tokens == pytest.approx(report.asked, abs=0.5)
        return
    assert report.final_tokens == pytest.approx(report.asked)
    assert sum(len(k) for k in report.kept) == sum(asked)
    if method.stages == {"features"}:  # each on its own
        assert [len(k) for k in report.kept] == asked


@pytest.mark.parametrize(
    "method, family", [(m, ("onevision", "qwen3")[n % 2]) for n, m in enumerate(METHODS)]
)
@torch.no_grad()
def test_keeping_all_is_stock_and_budgets_are_met(method: str, family: str) -> None:
    """Invariants 1, 2 and 5 of every method; a method that keeps half changes the logits."""
    other = FLAT if mini.qwen(family) else SHORT
    rows = [[SHORT], [other]]
    model, inputs = mini.build(family), mini.prompt(rows, family, pad="left")
    stock, steps, _ = result(model, inputs)
    before = snapshot(model)
    with vtc.compressing(model, made(method, Fraction(1))):
        got, got_steps, _ = result(model, inputs)
        torch.testing.assert_close(got, stock, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got_steps, steps, atol=1e-5, rtol=1e-5)
    with vtc.compressing(model, made(method)) as session:
        assert not torch.equal(result(model, inputs)[1], steps)
        model(**inputs)
        if made(method).stages & (CHOOSING | {"cache"}):
            check_report(session.report(), made(method), rows, family)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("method, family", cases())
@torch.no_grad()
def test_batch_mates_do_not_matter(method: str, family: str) -> None:
    """Invariant 6."""
    model = vtc.wrap(mini.build(family), made(method))
    for rows, how in inputs_for(family, method).values():
        inputs = mini.prompt(rows, family, **how)
        together = model(**inputs).logits
        for r in range(len(rows)):
            got = together[r][inputs["attention_mask"][r].bool()]
            want = model(**mini.part(inputs, r, rows, family)).logits[0]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", mini.FAMILIES)
@pytest.mark.parametrize("method", ["divprune", "mustdrop", "fastv"])
@torch.no_grad()
def test_beams(method: str, family: str) -> None:
    """Features encoded once and repeated for every beam, image and video each in their place."""
    model = vtc.wrap(mini.build(family), made(method))
    rows = [[SHORT, image(family)]] if family != "qwen3" else [[SHORT]]
    inputs = mini.prompt(rows, family)
    how = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 2}

    def beams() -> Any:
        return model.generate(**inputs, **how, output_scores=True, return_dict_in_generate=True)

    got, want, _ = compare(model, beams)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_second_turn_with_a_video(family: str) -> None:
    """An image first, then a video, on one cache."""
    model = vtc.wrap(mini.build(family), made("fastv"))
    first = mini.prompt([[image(family)]] * 2, family, seed=1)
    second = mini.prompt([[SHORT]] * 2, family, seed=2)
    del second["attention_mask"]
    length = first["input_ids"].shape[1]

    def turn(inputs: dict[str, Tensor], cache: Any = None) -> tuple[Tensor, Any]:
        out = model(**inputs, use_cache=True, **giving(model, cache))
        step = model(input_ids=torch.tensor([[9], [8]]), **giving(model, cache_left(out)))
        return torch.cat([out.logits[:, -3:], step.logits], 1), cache_left(out)

    engine = model.vtc.decoder
    with recording(engine) as seen_first:
        _, cache = turn(first)
    with recording(engine) as seen_second:
        got, _ = turn(second, cache)
    layers = engine.sites.decoder.layers
    engine.remove()
    with masked(layers, seen_first.alive):
        _, cache = turn(first)
        with masked(layers, seen_second.alive, start=length + 1):
            want, _ = turn(second, cache)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_long_and_short_videos(family: str) -> None:
    """Other numbers of frames on one model, one after another, and images alone in between."""
    model, chosen = mini.build(family), made("vidcom2")
    vtc.wrap(model, chosen)
    for rows in ([[LONG]], [[image(family)]], [[Clip(1)]], [[SHORT]]):
        inputs = mini.prompt(rows, family)
        (got, steps, _), (want, want_steps, _), alive = compare(
            model, lambda inputs=inputs: result(model, inputs)
        )
        seen = alive[len(alive) - 1]
        torch.testing.assert_close(got[seen], want[seen], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
        report = model.vtc.report()
        n = mini.tokens(rows[0][0], family)
        assert (report.visual_tokens, report.final_tokens) == (n, chosen.budget(n))
        video = isinstance(rows[0][0], Clip)
        assert (report.videos is not None) is video
        assert (report.grids is None and report.layouts is None) is video


@pytest.mark.parametrize("method", ["pool", "vidcom2"])
@pytest.mark.parametrize("family", mini.FAMILIES)
def test_gradients_reach_the_tower(family: str, method: str) -> None:
    """Through pooling, projector and DeepStack, from an image and a video."""
    model, inputs = mini.build(family), mini.prompt([[image(family), SHORT]], family)
    vtc.wrap(model, made(method))
    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(is_visual(inputs), -100)).loss
    loss.backward()
    tower = model.model.visual if mini.qwen(family) else model.model.vision_tower
    first = next(tower.parameters())
    assert torch.isfinite(loss) and torch.isfinite(first.grad).all()
    assert first.grad.abs().max() > 1e-6


@pytest.mark.parametrize("family", ["onevision", "next-video"])
@torch.no_grad()
def test_prompts_as_embeddings(family: str) -> None:
    """Placeholders of both kinds are found in `inputs_embeds`, and in bfloat16."""
    model, inputs = mini.build(family).bfloat16(), mini.prompt([[image(family), SHORT]], family)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    vtc.wrap(model, made("visionzip"))
    want = model(**inputs).logits
    kept = [k.tolist() for k in model.vtc.report().kept]
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model(**inputs).logits, want)
    assert [k.tolist() for k in model.vtc.report().kept] == kept
    counts = mini.tokens(image(family), family), SHORT.tokens
    assert [len(k) for k in kept] == [made("visionzip").budget(n) for n in counts]


# ---- what cannot work ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_refused_before_compute(family: str) -> None:
    model = mini.build(family)
    ran: list[str] = []
    tower = model.model.visual if mini.qwen(family) else model.model.vision_tower
    tower.register_forward_hook(lambda *args: ran.append("tower"))
    video = mini.prompt([[SHORT]], family)
    still = mini.prompt([[image(family)]], family)
    with vtc.compressing(model, EVS(keep_ratio=0.5)):
        with pytest.raises(vtc.UnsupportedError, match="prompt has an image; use vidcom2"):
            model(**still)
        model.generate(**video, max_new_tokens=2)  # nothing is left over from what was refused
    ran.clear()
    few = r"4 tokens of 12.*keep_tokens=4 or more"
    with vtc.compressing(model, EVS(keep_tokens=3)), pytest.raises(vtc.UnsupportedError, match=few):
        model(**video)
    for method in ("tome", "downsample", "mustdrop"):
        if mini.qwen(family):
            with pytest.raises(vtc.UnsupportedError, match=r"joins 2 x 2 patches|\[CLS\]"):
                vtc.wrap(model, method)
            continue
        own = vtc.methods()[method].without_cls if family == "onevision" else {}
        with vtc.compressing(model, method, keep_ratio=0.5, **own):
            way = "give it merge_threshold=None" if method == "mustdrop" else "use methods"
            match = f"{method} takes tokens.*pools the patches of each frame.*{way}.*vidcom2"
            for call in (model, model.generate):
                with pytest.raises(vtc.UnsupportedError, match=match):
                    call(**video)
    assert not ran
    with pytest.raises(vtc.UnsupportedError, match=r"takes images only.*vtc\.wrap"):
        vtc.compress_inputs(model, video, "divprune")


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_evs_needs_a_model_with_videos(tower: str) -> None:
    model = mini_llava.build(tower)
    for part in (model, model.model.vision_tower):
        with pytest.raises(vtc.UnsupportedError, match=r"no videos of this model.*: vidcom2"):
            vtc.wrap(part, "evs")


@torch.no_grad()
def test_chunked_prefill_is_refused() -> None:
    for family in ("onevision", "qwen3"):
        model = vtc.wrap(mini.build(family), "divprune", keep_ratio=0.5)
        if "mm_encoder_outputs" not in signature(model.forward).parameters:
            return  # else Hugging Face does not get that far
        with pytest.raises(vtc.UnsupportedError, match="chunked"):
            model.generate(**mini.prompt([[SHORT]], family), max_new_tokens=2, prefill_chunk_size=8)


def edged(family: str, edge: int) -> Any:
    """A model whose frames have edge x edge patches."""
    config = mini.build(family).config
    config.vision_config.image_size = 8 * edge
    config.image_grid_pinpoints = [[8 * edge, 8 * edge]]
    torch.manual_seed(0)
    model = type(mini.build(family))(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(2.0)
    return model


@pytest.mark.parametrize("edge", [4, 5, 6])
@pytest.mark.parametrize("family", ["onevision", "next-video"])
@torch.no_grad()
def test_frames_are_pooled_as_the_model_does(family: str, edge: int) -> None:
    """Features, keys and attention of a frame at the places of its tokens; odd edges too."""
    model = edged(family, edge)
    side = (edge + 1) // 2 if family == "onevision" else edge // 2
    rows = side * side * 3 + (family == "onevision")
    ids = torch.tensor([[7, 8, *[mini.VIDEO] * rows, 9, 10]])
    pixels = torch.randn(1, 3, 3, 8 * edge, 8 * edge, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "pixel_values_videos": pixels}
    tower = model.model.vision_tower
    hidden = tower(pixels[0], output_hidden_states=True).hidden_states
    layer = model.config.vision_feature_layer
    prefix = int(family == "next-video")
    features = hidden[layer][:, prefix:]
    rows_of_video = model.get_video_features(pixels)
    projected = getattr(rows_of_video, "pooler_output", rows_of_video)[0].flatten(0, -2)

    attn = [m for m in tower.modules() if type(m).__name__.endswith("Attention")][1]
    x = [m for m in tower.modules() if hasattr(m, "layer_norm1")][1].layer_norm1(hidden[1])
    query, key = (p(x).unflatten(-1, (2, 16)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
    weights = (query @ key.transpose(-1, -2) / 4).softmax(-1).mean((1, 2))[:, prefix:]
    keys = key.transpose(1, 2)[:, prefix:]

    def pooled(x: Tensor) -> Tensor:
        """(3, edge * edge, ...) on the tokens, by loops over bilinear weights or windows."""
        flat = x.reshape(3, edge, edge, -1)
        out = flat.new_zeros(3, side, side, flat.shape[-1])
        for i in range(side):
            for j in range(side):
                for a, wa in stretch(i):
                    for b, wb in stretch(j):
                        out[:, i, j] += wa * wb * flat[:, a, b]
        return out.reshape(3, side * side, *x.shape[2:])

    def stretch(i: int) -> list[tuple[int, float]]:
        if family == "next-video":
            return [(2 * i, 0.5), (2 * i + 1, 0.5)]
        at = (i + 0.5) * edge / side - 0.5
        low = int(at)
        return [(low, 1 - (at - low)), (min(low + 1, edge - 1), at - low)]

    area = edge**2 / side**2 if family == "onevision" else 4
    seen = looked(model, inputs, Look)
    assert [view["video"] for view in seen] == [0, 0, 0]
    for t, view in enumerate(seen):
        assert view["grid"] == (side, side) and view["frame"] is None
        n = side * side
        torch.testing.assert_close(view["features"], pooled(features)[t], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(view["projected"], projected[t * n : (t + 1) * n])
        torch.testing.assert_close(view["key"], pooled(keys)[t], atol=1e-5, rtol=1e-5)
        want = pooled(weights[..., None])[t, :, 0] * area
        torch.testing.assert_close(view["received"], want, atol=1e-6, rtol=1e-5)
    (whole,) = looked(model, inputs, LookJoint)
    assert whole["total"] == 3 * side * side and whole["frames"] == 3
    assert whole["frame"].tolist() == [t for t in range(3) for _ in range(side * side)]
    assert whole["index"].tolist() == list(range(3 * side * side))
    for name in ("features", "projected", "key", "received"):
        want = torch.cat([view[name] for view in seen])
        torch.testing.assert_close(whole[name], want)


@pytest.mark.parametrize("family", ["qwen2", "qwen2.5", "qwen3"])
@torch.no_grad()
def test_frames_of_qwen_are_what_images_would_be(family: str) -> None:
    """A frame is seen like an image of the same pixels: frames attend each to itself alone."""
    model = mini.build(family, "eager")
    inputs = mini.prompt([[FLAT], [SHORT]], family, pad="left")
    seen = looked(model, inputs, Look)
    assert [view["video"] for view in seen] == [0] * 4 + [1] * 3
    sizes = [[FLAT.grid] * 4, [SHORT.grid] * 3]
    stills: Any = mini.prompt(sizes, family, pad="left")
    stills["pixel_values"] = inputs["pixel_values_videos"]
    images = looked(model, stills, Look)
    for frame, still in zip(seen, images, strict=True):
        assert frame["grid"] == still["grid"]
        for name in ("features", "projected", "key", "received"):
            torch.testing.assert_close(frame[name], still[name], atol=1e-5, rtol=1e-5)
    joint = looked(model, inputs, LookJoint)
    assert [view["frames"] for view in joint] == [4, 3]
    assert joint[1]["frame"].tolist() == [t for t in range(3) for _ in range(4)]
    want = torch.cat([view["features"] for view in seen[:4]])
    torch.testing.assert_close(joint[0]["features"], want)


@torch.no_grad()
def test_deepstack_of_merged_frames_is_their_mean() -> None:
    """Features for the first LLM layers follow what was merged in a video, too."""
    model, inputs = mini.build("qwen3"), mini.prompt([[SHORT]], "qwen3")
    call = {k: inputs[k] for k in ("pixel_values_videos", "video_grid_thw")}
    stock = model.get_video_features(**call)
    with vtc.compressing(model, "pool", keep_tokens=3):
        got = model.get_video_features(**call)
    left = ~got.pooler_output[0][:, 0].isnan()
    assert left.sum() == 3
    for rows, full in zip(got.deepstack_features, stock.deepstack_features, strict=True):
        rows, full = (x if isinstance(x, Tensor) else torch.cat(list(x)) for x in (rows, full))
        want = full.reshape(3, 4, -1).mean(1)
        torch.testing.assert_close(rows[left], want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merged_frames() -> None:
    """The mean of the rows where the projector has run before pooling, else of what it takes."""
    for family in ("onevision", "next-video"):
        model, inputs = mini.build(family), mini.prompt([[SHORT]], family)
        seen = looked(model, inputs, Look)
        projector = model.model.multi_modal_projector
        with vtc.compressing(model, "pool", keep_tokens=3):
            got = model.get_video_features(inputs["pixel_values_videos"])
        got = getattr(got, "pooler_output", got)[0].flatten(0, -2)[:12]
        got = got[~got[:, 0].isnan()]
        if family == "onevision":
            want = torch.stack([view["projected"].mean(0) for view in seen])
        else:
            want = projector(torch.stack([view["features"].mean(0) for view in seen]))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_prompt_order() -> None:
    ids = torch.tensor([[4, 4, 0, 3, 3, 3, 4], [3, 0, 4, 4, 3, 0, 0]])
    parts = {
        "image": split_lengths(ids == 3, [3, 1, 1]),
        "video": split_lengths(ids == 4, [2, 1, 2]),
    }
    images, image, position, kinds = in_prompt_order(parts)
    assert images == [[2, 3, 1], [1, 2, 1]]
    assert kinds == [["video", "image", "video"], ["image", "video", "image"]]
    assert image.tolist() == [[0, 0, -1, 1, 1, 1, 2], [0, -1, 1, 1, 2, -1, -1]]
    assert position[0].tolist() == [0, 1, 0, 0, 1, 2, 0]


@torch.no_grad()
def test_globalcom2_takes_frames_as_images() -> None:
    """The budget by tokens, the best of each frame by its own view."""
    model, inputs = mini.build("next-video"), mini.prompt([[SHORT]], "next-video")
    chosen = made("globalcom2", 6)
    seen = looked(model, inputs, Look)
    with vtc.compressing(model, chosen) as session:
        model(**inputs)
        kept = session.report().kept[0].tolist()
    want = []
    for t, view in enumerate(seen):
        x = F.normalize(view["features"], dim=-1)
        far = -(x @ F.normalize(view["features"].mean(0), dim=0))
        want += sorted((4 * t + far.topk(2).indices).tolist())
    assert kept == want


# ---- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_cost_grows_with_the_frames(family: str) -> None:
    """Encoder and projector of a video cost what its frames cost, one by one."""
    model = mini.build(family)
    cost = []
    for rows in ([[Clip(1)]], [[Clip(2)]], [[Clip(4)]], [[image(family)]]):
        inputs = mini.prompt(rows, family)
        with vtc.observe(model) as session:
            model(**inputs)
            llm, report = session.sites.decoder, session.report()
        lengths = [inputs["input_ids"].shape[1]] * len(llm.decoder.layers)
        shape = llm.hidden, llm.mlp_width, llm.heads, llm.kv_heads, llm.head_dim
        rest = decoder_flops(lengths, *shape, lengths) + llm.hidden * llm.vocab
        cost.append(report.flops_all_full - rest)
    assert cost[1] == pytest.approx(2 * cost[0], rel=1e-9)
    assert cost[2] == pytest.approx(4 * cost[0], rel=1e-9)
    if family in IMAGES:  # a thumbnail and 2 x 2 crops, each as large as a frame
        own = 5 * cost[0]
        if family == "next-video":  # whose patches are projected four times as often
            own += 5 * (16 - 4) * (32 * 48 + 48 * 48)
        assert cost[3] == pytest.approx(own, rel=1e-9)
    else:  # 3 x 4 tokens, and frames of 2 x 2: attention is quadratic
        assert 3 * cost[0] < cost[3] < 9 * cost[0]
    both = mini.prompt([[Clip(2), image(family)]], family)
    with vtc.observe(model) as session:
        model(**both)
        report = session.report()
    lengths = [both["input_ids"].shape[1]] * len(llm.decoder.layers)
    rest = decoder_flops(lengths, *shape, lengths) + llm.hidden * llm.vocab
    assert report.flops_all_full - rest == pytest.approx(cost[1] + cost[3], rel=1e-9)
