# SPDX-License-Identifier: Apache-2.0
"""`cdpruner` by itself."""

from __future__ import annotations

from dataclasses import replace

import mini_anyres as anyres
import mini_llava as mini
import pytest
import torch
from naive_in_front import ADAPTIVE, METHODS, cosine, query, rows_of, run, stock
from synthetic_views import N, features_view
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

import vtc
from vtc.errors import UnsupportedError
from vtc.methods.cdpruner import CDPruner, TextQuery, embed_text, greedy_map

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


@pytest.mark.slow
@torch.no_grad()
def test_cdpruner_on_the_embedded_model():
    """The text tower was trained on [class token; mean patch] of this tower: each patch as both."""
    from vtc.benchmarks.tasks.registry import Task
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
