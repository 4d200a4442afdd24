# SPDX-License-Identifier: Apache-2.0
"""Methods between LLM layers: worked examples, published costs, and a naive loop as oracle."""

from __future__ import annotations

import itertools
import math

import mini_llava as mini
import pytest
import torch
from naive_in_llm import naive_peaks
from torch.nn.functional import cosine_similarity

import vtc
from vtc.errors import UnsupportedError
from vtc.methods.dart import DART
from vtc.methods.diprune import DIPrune
from vtc.methods.fastv import FastV
from vtc.methods.mob import MoB
from vtc.methods.pyramiddrop import PyramidDrop
from vtc.methods.sparsevlm import SparseVLM
from vtc.methods.transprune import HIGH, LOW, TransPrune
from vtc.registry import resolve
from vtc.report.flops import llm_flops

METHODS = {m.name: m for m in (TransPrune, PyramidDrop, SparseVLM, DART, MoB, DIPrune)}
STAGED = (TransPrune, PyramidDrop, SparseVLM)


# ---- schedules and what they cost --------------------------------------------------------------


def tera(counts):
    return llm_flops(counts, 4096, 11008) / 1e12


def test_published_flops():
    assert tera([576] * 32) == pytest.approx(3.817, abs=5e-4)
    fastv = FastV()
    (after,) = fastv.decoder_layers(32)
    counts = [576] * (after + 1) + [fastv.budget(576)] * (31 - after)
    assert tera(counts) == pytest.approx(2.007, abs=5e-4)
    assert tera(PyramidDrop().schedule(576, 32)) == pytest.approx(1.777, abs=5e-4)
    assert tera(TransPrune().schedule(576, 32)) == pytest.approx(1.557, abs=5e-4)
    low = TransPrune.paper("llava-1.5", tokens=36)
    assert tera(low.schedule(576, 32)) == pytest.approx(1.187, abs=5e-4)
    # Behind a front end that leaves 288 or 192 tokens.
    late = TransPrune(ratios=(0.5, 0.25, 0.125))
    assert tera(late.schedule(288, 32)) == pytest.approx(0.661, abs=5e-4)
    assert tera(late.schedule(192, 32)) == pytest.approx(0.44, abs=5e-3)
    assert sum(TransPrune().schedule(576, 32)) / 32 == pytest.approx(236, abs=0.5)
    assert sum(low.schedule(576, 32)) / 32 == pytest.approx(180, abs=0.5)
    assert sum(PyramidDrop().schedule(576, 32)) / 32 == pytest.approx(270, abs=0.5)


def test_published_schedules():
    assert TransPrune().schedule(576, 32) == [576] * 7 + [504] * 2 + [360] * 3 + [72] * 20
    assert PyramidDrop().schedule(576, 32) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert SparseVLM().schedule(576, 32) == [576] * 3 + [300] * 4 + [200] * 9 + [110] * 16
    assert tuple(TransPrune().decoder_layers(32)) == (6, 7, 8, 9, 10, 11)
    assert tuple(PyramidDrop().decoder_layers(32)) == (7, 15, 23)
    assert tuple(SparseVLM().decoder_layers(32)) == (-1, 2, 6, 15)
    assert tuple(DART().decoder_layers(32)) == tuple(MoB().decoder_layers(32)) == (1,)
    assert tuple(DIPrune().decoder_layers(32)) == (7, 9)
    # DIPrune's published averages over the layers: 312, 268 and 224 tokens.
    for tokens, mean in ((192, 312), (128, 268), (64, 224)):
        after = DIPrune.paper("llava-1.5", tokens=tokens).decoder_layers(32)[-1] + 1
        assert (after * 576 + (32 - after) * tokens) / 32 == mean


def test_papers():
    high = TransPrune.paper("llava-1.5", tokens=72)
    assert high.ratios == HIGH and high.positions == "compact" and high.shares(576)[-1] == 72
    assert TransPrune.paper("llava-next", tokens=180).ratios == LOW
    assert TransPrune.paper("llava-next", tokens=360).budget(2880) == 360
    assert PyramidDrop.paper("llava-1.5", tokens=72).shares(576) == (288, 144, 72)
    for tokens, counts in {
        192: (300, 200, 110),
        128: (303, 110, 36),
        96: (238, 48, 26),
        64: (66, 30, 17),
    }.items():
        assert SparseVLM.paper("llava-1.5", tokens=tokens).shares(576) == counts
    for tokens in (288, 144):
        fastv = FastV.paper("llava-1.5", tokens=tokens)
        assert fastv.budget(576) == tokens and list(fastv.decoder_layers(32)) == [1]
    for cls in (DART, MoB, DIPrune):
        assert cls.paper("llava-1.5", tokens=128).budget(576) == 128
    assert (
        MoB().split(64) == (32, 4) and MoB().split(128) == (48, 6) and MoB().split(192) == (64, 8)
    )
    assert MoB().split(1) == (1, 2) and MoB(prompt_tokens=9, neighbours=3).split(5) == (5, 3)


@pytest.mark.parametrize("cls", STAGED)
def test_budgets_of_staged_methods(cls):
    assert cls().positions == "original"
    published = cls.published
    assert cls(keep_ratio=published[-1]).shares(576) == cls().shares(576)
    assert cls(keep_tokens=cls().budget(576)).shares(576) == cls().shares(576)
    for n, k in itertools.product((1, 2, 16, 144, 576, 2880), (1, 2, 5, 64, 100, 576)):
        shares = cls(keep_tokens=k).shares(n)
        assert shares[-1] == min(k, n) == cls(keep_tokens=k).budget(n)
        assert n >= shares[0] >= shares[1] >= shares[2]
    assert cls(keep_ratio=1.0).shares(576) == (576, 576, 576)
    assert cls(ratios=(0.5, 0.2, 0.001)).shares(576) == (288, 115, 1)  # truncated, at least 1
    assert cls(ratios=(0.5, 0.2, 0.2)).shares(19) == (9, 3, 3)
    for depth in (4, 5, 8, 12, 24, 28, 32, 40, 80):
        layers = cls().stage_layers(depth)
        assert len(set(layers)) == 3 and list(layers) == sorted(layers)
        assert layers[0] >= 0 and layers[-1] <= depth - 2
        assert cls(keep_tokens=7).schedule(576, depth)[-1] == 7
    assert cls().stage_layers(64) == tuple(2 * layer + 1 for layer in cls.layers)
    tiny = {TransPrune: (1, 2, 3), PyramidDrop: (1, 3, 5), SparseVLM: (0, 1, 3)}
    assert cls().stage_layers(8) == tiny[cls]
    with pytest.raises(UnsupportedError, match="needs at least 4; the language model has 3"):
        cls().decoder_layers(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TransPrune(ratios=HIGH, keep_ratio=0.5), "ratios or a budget"),
        (lambda: TransPrune(ratios=(0.5, 0.25)), "3 falling shares"),
        (lambda: TransPrune(ratios=(0.5, 0.6, 0.1)), "3 falling shares"),
        (lambda: TransPrune(ratios=(1.5, 0.6, 0.1)), r"in \(0, 1\]"),
        (lambda: TransPrune(layers=(6, 8)), "3 ascending"),
        (lambda: PyramidDrop(layers=(7, 7, 9)), r"got \(7, 7, 9\)"),
        (lambda: SparseVLM(layers=(-1, 7, 9)), r"got \(-1, 7, 9\)"),
        (lambda: TransPrune(alpha=1.5), r"in \[0, 1\]; got 1.5"),
        (lambda: TransPrune(direction="cos"), "got 'cos'"),
        (lambda: SparseVLM(recycle=-0.1), "got -0.1"),
        (lambda: SparseVLM(deletion=2), "got 2"),
        (lambda: SparseVLM(adaptive=True, keep_ratio=0.5), "give no keep_ratio"),
        (lambda: SparseVLM(adaptive=True, ratios=HIGH), "or ratios with it"),
        (lambda: DART(layer=0), "at least 1; got 0"),
        (lambda: DART(visual_pivots=0), "visual_pivots is .*got 0"),
        (lambda: DART(text_pivots=-1), "text_pivots is .*got -1"),
        (lambda: MoB(layer=0), "at least 1; got 0"),
        (lambda: MoB(prompt_tokens=0), "prompt_tokens is a count, at least 1; got 0"),
        (lambda: MoB(neighbours=-2), "neighbours is a count, at least 1; got -2"),
        (lambda: DIPrune(delta=0), "at least 1; got 0"),
        (lambda: DIPrune(layer=1), "at least delta=2"),
        (lambda: DIPrune(margin=0), r"in \(0, 1\]; got 0"),
        (lambda: DIPrune(alpha=-1), r"in \[0, 1\]; got -1"),
        (lambda: TransPrune.paper("llava-1.5", 64), r'known: \("llava-1.5", tokens=72\)'),
    ],
)
def test_bad_parameters_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_registered():
    for name, cls in METHODS.items():
        (method,) = resolve(name, keep_ratio=0.5)
        assert type(method) is cls and method.stages == {"decoder"} and cls.summary


# ---- a naive loop over the layers, one row, nothing shared with the library --------------------


class Naive:
    """A decoder run layer by layer with its own modules; tokens are taken out in between."""

    def __init__(self, model, inputs, compact=False):
        self.lm, self.compact = model.model.language_model, compact
        stock = model(**inputs, output_hidden_states=True)
        self.h = stock.hidden_states[0]
        ids = inputs["input_ids"][0]
        self.column = list(range(len(ids)))  # original columns that are left
        self.image = [c for c in self.column if ids[c] == mini.IMAGE]
        self.head = model.lm_head
        self.layer = -1

    @property
    def visual(self):
        return [i for i, c in enumerate(self.column) if c in set(self.image)]

    @property
    def prompt(self):
        """Text behind the last image that is left; the last token where there is none."""
        rows = list(range(self.visual[-1] + 1, len(self.column)))
        return rows or [len(self.column) - 1]

    def attend(self, layer):
        """Input, output and map (H, T, T) of the attention of a layer on the tokens now."""
        block = self.lm.layers[layer]
        t = self.h.shape[1]
        positions = torch.arange(t) if self.compact else torch.tensor(self.column)
        mask = torch.full((t, t), -1e30).triu(1)[None, None]
        tables = self.lm.rotary_emb(self.h, positions[None])
        x = block.input_layernorm(self.h)
        out, weights = block.self_attn(x, position_embeddings=tables, attention_mask=mask)[:2]
        return x, out, weights[0]

    def step(self):
        self.layer += 1
        block = self.lm.layers[self.layer]
        self.x, self.a, self.map = self.attend(self.layer)
        h = self.h + self.a
        self.y = block.post_attention_layernorm(h)
        self.m = block.mlp(self.y)
        self.h = h + self.m

    def keep(self, tokens):
        """Take out all visual tokens but these, given by their place in the sequence now."""
        gone = set(self.visual) - set(tokens)
        left = [i for i in range(len(self.column)) if i not in gone]
        self.h = self.h[:, left]
        self.column = [self.column[i] for i in left]

    def run(self, choose):
        choose(self)
        for _ in self.lm.layers:
            self.step()
            choose(self)
        patches = [self.image.index(self.column[i]) for i in self.visual]
        return patches, self.head(self.lm.norm(self.h))[0, -1]


def best(scores, k):
    """The k keys of a dict with the highest values, in order."""
    return sorted(sorted(scores, key=lambda j: (-scores[j], j))[:k])


def naive_transprune(method, depth):
    total = {}

    def choose(run):
        layers = method.stage_layers(depth)
        if not layers[0] <= run.layer <= layers[-1]:
            return
        for before, after in ((run.x[0], run.a[0]), (run.y[0], run.m[0])):
            cos = cosine_similarity(before, after, -1)
            turn = cos.abs() if method.direction == "abs" else cos
            weight = (1 - turn).exp() / (1 - turn).exp().sum()
            for i in run.visual:
                size = after[i].norm() / before[i].norm()
                total[run.column[i]] = total.get(run.column[i], 0.0) + float(size * weight[i])
        if run.layer not in layers:
            return
        _, _, ahead = run.attend(run.layer + 1)
        guided = {i: ahead[:, run.prompt, i].mean().item() for i in run.visual}
        change = {i: total[run.column[i]] for i in run.visual}
        a, b = sum(change.values()), sum(guided.values())
        score = {
            i: method.alpha * change[i] / a + (1 - method.alpha) * guided[i] / b for i in change
        }
        run.keep(best(score, method.shares(len(run.image))[layers.index(run.layer)]))

    return choose


def naive_pyramiddrop(method, depth):
    def choose(run):
        layers = method.stage_layers(depth)
        if run.layer in layers:
            _, _, ahead = run.attend(run.layer + 1)
            score = {i: ahead[:, -1, i].mean().item() for i in run.visual}
            run.keep(best(score, method.shares(len(run.image))[layers.index(run.layer)]))

    return choose


def naive_sparsevlm(method, depth):
    chosen = []

    def choose(run):
        layers = method.stage_layers(depth)
        if run.layer == -1:
            h, rows = run.h[0], run.prompt
            share = torch.stack([(h[rows] @ h[j]).softmax(0) for j in run.visual]).mean(0)
            chosen.extend(
                run.column[r] for r, s in zip(rows, share, strict=True) if s >= share.mean()
            )
        if run.layer not in layers:
            return
        rows = [i for i, c in enumerate(run.column) if c in chosen]
        attention = run.map[:, rows].mean(0)
        score = {i: attention[:, i].mean().item() for i in run.visual}
        n = len(score)
        if method.adaptive:
            rank = torch.linalg.matrix_rank(attention[:, run.visual], rtol=1e-5).item()
            k = max(1, n - math.floor(method.deletion * (n - rank)))
        else:
            k = method.shares(len(run.image))[layers.index(run.layer)]
        kept, pool, clusters = method.split(n, k)
        stay = best(score, kept)
        rest = {i: s for i, s in score.items() if i not in stay}
        recycled = best(rest, pool)
        if recycled:
            x = run.h[0, recycled].clone()
            into = naive_peaks(x, clusters)
            for centre in set(into):
                members = [x[i] for i in range(len(x)) if into[i] == centre]
                run.h[0, recycled[centre]] = torch.stack(members).mean(0)
                stay.append(recycled[centre])
        run.keep(stay)

    return choose


def naive_dart(method, depth):
    def choose(run):
        if run.layer != method.layer - 1:
            return
        k, attn = method.budget(len(run.image)), run.lm.layers[run.layer].self_attn
        key = attn.k_proj(run.x)[0].unflatten(-1, (-1, attn.head_dim))  # before RoPE: same norm
        d = attn.head_dim // 2
        norm = [
            sum(math.hypot(h[c], h[c + d]) for h in key[i].tolist() for c in range(d))
            for i in range(len(run.column))
        ]
        by_norm = sorted(run.visual, key=lambda i: -norm[i])[: method.visual_pivots]
        text = sorted(run.prompt, key=lambda i: -norm[i])[: method.text_pivots]
        kept = by_norm[:k]
        quota = math.ceil(k / len(by_norm + text))
        for p in by_norm + text:
            free = [i for i in run.visual if i not in kept]
            cos = {i: -cosine_similarity(run.h[0, p], run.h[0, i], 0).item() for i in free}
            kept += best(cos, min(quota, k - len(kept)))
        run.keep(kept)

    return choose


def naive_mob(method, depth):
    def choose(run):
        if run.layer != method.layer - 1:
            return
        k = method.budget(len(run.image))
        share, neighbours = method.split(k)
        x = torch.nn.functional.normalize(run.h[0], dim=-1)
        cos = x @ x.T
        near = set()
        for i in run.prompt:
            near |= set(best({j: cos[i, j].item() for j in run.visual}, neighbours))
        top = {j: max(cos[i, j].item() for i in run.prompt) for j in run.visual}
        kept = best({j: top[j] for j in near}, share)
        kept += best({j: top[j] for j in run.visual if j not in near}, share - len(kept))
        while len(kept) < k:
            free = [j for j in run.visual if j not in kept]
            kept.append(max(free, key=lambda j: min(1 - cos[j, s].item() for s in kept)))
        run.keep(kept)

    return choose


def naive_diprune(method, depth):
    noted = {}

    def choose(run):
        first, last = method.decoder_layers(depth)
        if run.layer not in (first, last):
            return
        attention = run.map[:, run.prompt].mean((0, 1))
        order = sorted(run.visual, key=lambda j: -attention[j].item())
        noted[run.layer] = {j: order.index(j) for j in run.visual}
        if run.layer == last:
            n, now = len(order), noted[last]
            m = method.margin * n
            rise = {j: max(-m, min(m, noted[first][j] - now[j])) for j in now}
            score = {
                j: method.alpha * (1 - now[j] / n) + (1 - method.alpha) * (rise[j] / m + 1) / 2
                for j in now
            }
            score = {j: round(s, 6) for j, s in score.items()}  # ranks make ties
            run.keep(best(score, method.budget(len(run.image))))

    return choose


ORACLES = {
    TransPrune: naive_transprune,
    PyramidDrop: naive_pyramiddrop,
    SparseVLM: naive_sparsevlm,
    DART: naive_dart,
    MoB: naive_mob,
    DIPrune: naive_diprune,
}
VARIANTS = [
    *[cls(keep_tokens=6) for cls in METHODS.values()],
    *[cls(keep_tokens=1) for cls in METHODS.values()],
    *[cls(keep_tokens=11, positions="compact") for cls in METHODS.values()],
    TransPrune(),
    TransPrune.paper("llava-1.5", 36),
    TransPrune(keep_tokens=6, alpha=1.0),
    TransPrune(keep_tokens=6, alpha=1.0, direction="abs"),
    TransPrune(keep_tokens=6, alpha=0.0, layers=(4, 12, 20)),
    SparseVLM(keep_tokens=6, recycle=0.0),
    SparseVLM(keep_tokens=6, recycle=1.0),
    SparseVLM(adaptive=True),
    DART(keep_tokens=6, visual_pivots=2, text_pivots=9),
    MoB(keep_tokens=9, prompt_tokens=7, neighbours=1),
    MoB(keep_tokens=5, prompt_tokens=9),
    DIPrune(keep_tokens=6, layer=20, delta=9, margin=0.6),
]


@pytest.mark.parametrize("method", VARIANTS, ids=str)
@torch.no_grad()
def test_what_a_naive_loop_keeps(method):
    """Same patches and same logits as layer-by-layer loops on eager attention maps."""
    for seed, (decoder, images) in enumerate([("llama", 1), ("qwen2", 1), ("llama", 2)]):
        model = mini.build(decoder=decoder, attention="eager", seed=seed)
        inputs = mini.prompt(images, batch=1, seed=seed, after=6)
        naive = Naive(model, inputs, method.positions == "compact")
        choose = ORACLES[type(method)](method if images == 1 else _Doubled(method), 5)
        patches, logits = naive.run(choose)
        vtc.wrap(model, method)
        out = model(**inputs)
        report = model.vtc.report()
        kept = [
            image * mini.PATCHES + p
            for image, places in enumerate(report.kept)
            for p in places.tolist()
        ]
        assert kept == patches
        torch.testing.assert_close(out.logits[0, -1], logits, atol=1e-4, rtol=1e-4)


class _Doubled:
    """A method whose budgets are those of two images in one row."""

    def __init__(self, method):
        self.method = method

    def __getattr__(self, name):
        return getattr(self.method, name)

    def shares(self, n):
        return tuple(2 * s for s in self.method.shares(n // 2))

    def budget(self, n):
        return 2 * self.method.budget(n // 2)

    def split(self, *args):
        if isinstance(self.method, SparseVLM):
            return self.method.split(*args)
        share, neighbours = self.method.split(args[0] // 2)
        return 2 * share, neighbours


# ---- rows that differ --------------------------------------------------------------------------


def ragged(side):
    """Rows whose images, text before and text behind all differ in number, and each row alone."""
    rows = [
        mini.prompt(images, batch=1, seed=seed, before=before, after=after)
        for seed, (images, before, after) in enumerate([(1, 2, 3), (2, 5, 9), (1, 7, 1)])
    ]
    length = max(row["input_ids"].shape[1] for row in rows)
    both = {}
    for name in ("input_ids", "attention_mask"):
        gaps = [length - row[name].shape[1] for row in rows]
        ends = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
        both[name] = torch.cat(
            [torch.nn.functional.pad(row[name], end) for row, end in zip(rows, ends, strict=True)]
        )
    both["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    return both, rows


RAGGED = [
    *[cls(keep_tokens=5) for cls in METHODS.values()],
    TransPrune(ratios=LOW, positions="compact"),
    SparseVLM(keep_tokens=9, recycle=1.0),
    SparseVLM(adaptive=True),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", RAGGED, ids=str)
@torch.no_grad()
def test_rows_do_not_depend_on_their_mates(method, side):
    model = mini.build(seed=3)
    vtc.wrap(model, method)
    both, rows = ragged(side)
    together = model(**both).logits
    for r, row in enumerate(rows):
        real = both["attention_mask"][r].bool()
        torch.testing.assert_close(together[r][real], model(**row).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", METHODS.values())
@torch.no_grad()
def test_an_image_at_the_end_of_the_prompt(cls):
    model = mini.build(seed=4)
    vtc.wrap(model, cls(keep_tokens=5))
    inputs = mini.prompt(1, batch=2, after=0)
    assert (inputs["input_ids"][:, -1] == mini.IMAGE).all()
    assert model(**inputs).logits.isfinite().all()
    assert [len(k) for k in model.vtc.report().kept] == [5, 5]
