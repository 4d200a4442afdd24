# SPDX-License-Identifier: Apache-2.0
"""Methods of several stages on one model: each sees what the ones before it left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import mini_anyres
import mini_llava
import pytest
import torch
from snapshot import snapshot

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support.masked_oracle import compare, logits_and_steps
from vtc.method import Method
from vtc.methods.dart import DART
from vtc.methods.diprune import DIPrune
from vtc.methods.divprune import DivPrune
from vtc.methods.fastv import FastV
from vtc.methods.globalcom2 import GlobalCom2
from vtc.methods.mob import MoB
from vtc.methods.mod import MoD
from vtc.methods.mustdrop import MustDrop
from vtc.methods.pitome import PiToMe
from vtc.methods.prefixkv import PrefixKV
from vtc.methods.pyramiddrop import PyramidDrop
from vtc.methods.random import Random
from vtc.methods.sparsevlm import SparseVLM
from vtc.methods.todre import ToDRE
from vtc.methods.tops import TOPS
from vtc.methods.transprune import TransPrune
from vtc.methods.vidkv import VidKV
from vtc.methods.visionzip import VisionZip
from vtc.methods.vscan import VScan
from vtc.methods.zero_tprune import ZeroTPrune
from vtc.methods.zipvl import ZipVL
from vtc.reduction import gather_tokens
from vtc.views.decoder import DecoderView

READERS = [
    FastV(keep_tokens=4),
    TransPrune(keep_tokens=4),
    SparseVLM(keep_tokens=4),
    DART(keep_tokens=4),
    DIPrune(keep_tokens=4),
    MustDrop(keep_tokens=4),
    ToDRE(),
    TOPS(keep_tokens=4),
    VScan(keep_tokens=4),
]
# Of 16 patches: how many are left at the end, and how many of them the cache holds on average.
CHAINS = {
    "tower, boundary, LLM, cache": (
        (
            PiToMe(keep_tokens=12),
            VisionZip(keep_tokens=9),
            TransPrune(keep_tokens=5),
            PrefixKV(keep_tokens=3),
        ),
        5,
    ),
    "two in the tower, one that carries notes": (
        (ZeroTPrune(keep_tokens=13), MustDrop(keep_tokens=6)),
        6,
    ),
    "two at the boundary, two in the LLM": (
        (
            DivPrune(keep_tokens=12),
            Random(keep_tokens=10),
            FastV(keep_tokens=8),
            TransPrune(keep_tokens=4),
        ),
        4,
    ),
    "compact positions": (
        (
            VisionZip(keep_tokens=9, positions="compact"),
            FastV(keep_tokens=5, positions="compact"),
        ),
        5,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("pad", [None, "left", "right"])
@torch.no_grad()
def test_a_chain_is_its_masks(name: str, pad: str | None) -> None:
    methods, left = CHAINS[name]
    model = mini_llava.build(attention="sdpa" if pad else "eager")
    inputs = mini_llava.prompt([1, 2, 1] if pad else 1, pad=pad)
    stock = model(**inputs).logits
    before = snapshot(model)
    compact = methods[0].positions == "compact"
    vtc.wrap(model, vtc.chain(*methods))
    (got, steps, _), (want, want_steps, _), alive = compare(
        model, lambda: logits_and_steps(model, inputs, 4)
    )
    real = inputs["attention_mask"].bool()
    rows = real & alive[len(alive) - 1]
    assert (got[rows] - stock[rows]).abs().max() > 1e-3
    if not compact:  # masked tokens keep their places, so only "original" equals a mask
        torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5)
        if steps is not None:
            torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    images = (inputs["input_ids"] == mini_llava.IMAGE).sum(1) // mini_llava.PATCHES
    kept = (alive[len(alive) - 1] & (inputs["input_ids"] == mini_llava.IMAGE)).sum(1)
    assert kept.tolist() == (left * images).tolist()
    model(**inputs)
    report = model.vtc.report()
    assert report.final_tokens == pytest.approx(kept.double().mean().item())
    if isinstance(methods[-1], PrefixKV):
        assert report.kv_tokens == pytest.approx(3 * images.double().mean().item())
        assert report.kv_bytes < report.kv_bytes_full
    vtc.unwrap(model)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@torch.no_grad()
def test_the_named_methods_together_on_crops() -> None:
    """PiToMe in the tower, GlobalCom2 at the boundary, TransPrune in the LLM, PrefixKV behind."""
    model = mini_anyres.build("next")
    rows = [[mini_anyres.WIDE], [mini_anyres.TALL, mini_anyres.TINY]]
    inputs = mini_anyres.prompt(rows, "next", pad="left")
    methods = (
        PiToMe(keep_ratio=0.75),
        GlobalCom2(keep_ratio=0.5),
        TransPrune(keep_ratio=0.25),
        PrefixKV(keep_ratio=0.125),
    )
    stock = model(**inputs).logits
    vtc.wrap(model, vtc.chain(*methods))
    (got, steps, _), (want, want_steps, _), alive = compare(
        model, lambda: logits_and_steps(model, inputs, 4)
    )
    seen = inputs["attention_mask"].bool() & alive[len(alive) - 1]
    torch.testing.assert_close(got[seen], want[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    assert (got[seen] - stock[seen]).abs().max() > 1e-3
    model(**inputs)
    report = model.vtc.report()
    patches = [[mini_anyres.patches_of(size) for size in row] for row in rows]
    wanted = [sum(methods[2].budget(n) for n in row) for row in patches]
    assert report.final_tokens == pytest.approx(sum(wanted) / len(wanted))
    held = [sum(methods[3].budget(n) for n in row) for row in patches]
    assert report.kv_tokens == pytest.approx(sum(held) / len(held))


@torch.no_grad()
def test_packed_bits_of_pruned_tokens() -> None:
    """VidKV holds what FastV leaves: fewer tokens, at fewer bits."""
    model = mini_llava.build()
    inputs = mini_llava.prompt([6, 6], pad="left")
    sizes = {}
    for name, chain in {
        "fastv": vtc.chain(FastV(keep_ratio=0.5)),
        "both": vtc.chain(FastV(keep_ratio=0.5), VidKV(window=8, group=8)),
    }.items():
        with vtc.compressing(model, chain) as session:
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
            report = session.report()
            sizes[name] = report.kv_bytes
            assert report.final_tokens == 48
    assert sizes["both"] < sizes["fastv"]


@pytest.mark.parametrize("reader", READERS, ids=lambda m: m.name)
@torch.no_grad()
def test_bypassed_layers_cannot_be_read(reader: Method) -> None:
    """Refused at wrap, naming both; what does not meet runs."""
    model, inputs = mini_llava.build(), mini_llava.prompt([1, 2], pad="left")
    layers = [i for i in reader.decoder_layers(5) if i >= 0]
    for bypassing in (ZipVL(), ZipVL(keep_tokens=4), MoD(routers={layers[0]: torch.ones(48)})):
        for methods in ((reader, bypassing), (bypassing, reader)):
            with pytest.raises(vtc.UnsupportedError, match="jump over") as refused:
                vtc.wrap(model, vtc.chain(*methods))
            assert reader.name in str(refused.value) and bypassing.name in str(refused.value)
    apart = MoD(routers={4: torch.ones(48)})
    for methods in ((reader, apart), (reader, ZipVL(keep_ratio=1.0))):
        with vtc.compressing(model, vtc.chain(*methods)):
            model(**inputs)


@pytest.mark.parametrize(
    "method",
    [PyramidDrop(keep_tokens=4), MoB(keep_tokens=4), Random(keep_tokens=4), TOPS(llm_share=1.0)],
    ids=lambda m: m.name,
)
@torch.no_grad()
def test_what_reads_no_layer_behind_it_goes_with_bypassing(method: Method) -> None:
    model, inputs = mini_llava.build(), mini_llava.prompt([1, 2], pad="left")
    with vtc.compressing(model, vtc.chain(method, ZipVL(tau=0.7))):
        assert torch.isfinite(model(**inputs).logits).all()


@torch.no_grad()
def test_every_method_says_what_it_reads() -> None:
    """A registered method that reads the layer just run says so, or it fails behind a bypass."""
    model, inputs = mini_llava.build(), mini_llava.prompt(2)
    for name in sorted(vtc.methods()):
        method = seeded(name, None, 0)
        if "decoder" not in method.stages or method.needs & {"ran", "sublayers"}:
            continue
        with vtc.compressing(model, vtc.chain(method, ZipVL(tau=0.7))):
            model(**inputs)


@torch.no_grad()
def test_packed_slots_cannot_be_evicted() -> None:
    model, inputs = mini_llava.build(), mini_llava.prompt(2)
    vidkv, zipvl = VidKV(window=8, group=8), ZipVL(kv="mixed", group=8)
    once, ever = PrefixKV(keep_ratio=0.5), PrefixKV(keep_ratio=0.5, scope="all")
    for packs in (vidkv, zipvl):
        for wrong in ((packs, once), (packs, ever), (ever, packs)):
            with pytest.raises(vtc.UnsupportedError, match="in front") as refused:
                vtc.wrap(model, vtc.chain(*wrong))
            assert "prefixkv" in str(refused.value) and packs.name in str(refused.value)
        unaware = MustDrop(keep_tokens=6, output_aware=False)
        for right in ((once, packs), (packs, PrefixKV(keep_ratio=1.0)), (packs, unaware)):
            with vtc.compressing(model, vtc.chain(*right)):
                model.generate(**inputs, max_new_tokens=12, do_sample=False)
    with pytest.raises(vtc.UnsupportedError, match="both pack"):
        vtc.wrap(model, vtc.chain(vidkv, zipvl))


@dataclass(frozen=True, kw_only=True)
class LookAtLayer(Method):
    """Write down what the layer that has just run shows of the tokens that are left."""

    seen: list = field(default_factory=list)

    name: ClassVar[str] = "test-look"
    needs: ClassVar[frozenset[str]] = frozenset({"sublayers"})

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return (1,)

    def on_decoder_layer(self, v: DecoderView) -> None:
        patch = v.image * 100 + v.position  # names a visual token, whatever column it is in
        rows = [v.attention("last")[:, :, 0].mean(1), v.attention("prompt").sum((1, 2))]
        tokens = [v.key.transpose(1, 2).flatten(2), v.attention_input, v.mlp_output]
        rows += [gather_tokens(x, v.visual_index) for x in tokens]
        for r in range(len(patch)):
            real = slice(None) if v.valid is None else v.valid[r]
            names = patch[r][real].tolist()
            self.seen.append([dict(zip(names, x[r][real], strict=True)) for x in rows])


@dataclass(frozen=True, kw_only=True)
class TooEarly(LookAtLayer):
    name: ClassVar[str] = "test-too-early"

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return (-1, 1)


@torch.no_grad()
def test_there_is_no_attention_before_the_first_layer() -> None:
    model = mini_llava.build()
    with (
        vtc.compressing(model, TooEarly()),
        pytest.raises(vtc.UnsupportedError, match="before the first layer there is none"),
    ):
        model(**mini_llava.prompt(1))


@pytest.mark.parametrize("pad", [None, "left"])
@torch.no_grad()
def test_behind_a_drop_at_the_same_layer_views_show_the_tokens_left(pad: str | None) -> None:
    model = mini_llava.build()
    inputs = mini_llava.prompt([1, 2] if pad else 2, pad=pad)
    before, behind = LookAtLayer(), LookAtLayer()
    chain = vtc.chain(Random(keep_tokens=12), before, FastV(k=2, keep_tokens=6), behind)
    with vtc.compressing(model, chain):
        model(**inputs)
    assert len(before.seen) == len(behind.seen) == 2
    for full, left in zip(before.seen, behind.seen, strict=True):
        for a, b in zip(full, left, strict=True):
            assert len(a) == 2 * len(b) > 0
            for name, x in b.items():
                assert torch.equal(x, a[name])
