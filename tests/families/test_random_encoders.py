# SPDX-License-Identifier: Apache-2.0
"""Random encoders alone: what methods that merge or choose inside the tower owe at any geometry."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mini
import torch
import transformers as hf
from cases import few
from hypothesis import event, given
from hypothesis import strategies as st
from random_models import BUDGETED
from snapshot import snapshot

import vtc
from vtc.benchmarks.shared.budgets import seeded

METHODS = [m for m in BUDGETED if seeded(m, 4, 0).stages <= {"pixels", "vision", "features"}]
TOWERS = ("siglip", "clip", "dinov2", "vit", "timm")
EXHAUSTED = ("out of reach", "needs a layer that keeps less", "and this encoder has")


@dataclass(frozen=True)
class Tower:
    """An encoder of grid x grid patches, how many images it sees, and what compresses them."""

    kind: str
    grid: int
    blocks: int
    heads: int
    images: int
    method: str
    keep: int | Fraction


@st.composite
def towers(draw: Any) -> Tower:
    kind = draw(st.sampled_from(TOWERS))
    cls = kind != "siglip"
    return Tower(
        kind,
        grid=draw(st.integers(1, 9)),
        blocks=draw(st.integers(1, 5)),
        heads=draw(st.sampled_from((1, 2, 4))),
        images=draw(st.integers(1, 3)),
        method=draw(
            st.sampled_from([m for m in METHODS if cls or "cls" not in seeded(m, 4, 0).needs])
        ),
        keep=draw(
            st.one_of(
                st.integers(1, 90),
                st.sampled_from((Fraction(1, 9), Fraction(1, 2), Fraction(9, 10))),
            )
        ),
    )


def build(t: Tower) -> Any:
    torch.manual_seed(0)
    shape = {
        "num_hidden_layers": t.blocks,
        "num_attention_heads": t.heads,
        "patch_size": mini.PATCH,
    }
    shape["image_size"] = mini.PATCH * t.grid
    if t.kind == "timm":
        size = {"img_size": mini.PATCH * t.grid, "depth": t.blocks, "num_heads": t.heads}
        return mini.loud(mini._timm(**size))
    config = getattr(mini, f"{t.kind}_config")(**shape)
    name = {"clip": "CLIPVision", "siglip": "SiglipVision", "dinov2": "Dinov2", "vit": "ViT"}[
        t.kind
    ]
    return mini.loud(getattr(hf, name + "Model")(config))


def output(model: Any, pixels: torch.Tensor) -> Any:
    if hasattr(model, "forward_features"):
        return model.forward_features(pixels)
    out = model(pixel_values=pixels)
    return [x for x in out.values() if isinstance(x, torch.Tensor)]


def known(error: Exception) -> bool:
    event("refused")
    return any(reason in str(error) for reason in EXHAUSTED)


@few(30)
@given(towers())
@torch.no_grad()
def test_counts_mass_mates_and_unwrap(t: Tower) -> None:
    """Asked == kept == reported; merges conserve patches; an image alone keeps the same."""
    model, n = build(t), t.grid**2
    pixels = mini.images(t.images, size=mini.PATCH * t.grid)
    stock, before = output(model, pixels), snapshot(model)
    method = seeded(t.method, t.keep, 0)
    try:
        with vtc.compressing(model, method) as session:
            output(model, pixels)
            state, report = session.vision.state, session.report()
            kept = [k.tolist() for k in report.kept] or [list(range(n))] * t.images
            if t.method != "downsample":
                asked = method.budget(n, (t.grid, t.grid))
                assert [len(k) for k in kept] == [asked] * t.images
                assert report.asked == report.final_tokens == asked
            assert all(k == sorted(set(k)) and k[0] >= 0 and k[-1] < n for k in kept)
            if method.merges and "vision" in method.stages and state.reduction is not None:
                assert torch.equal(state.size.sum(1), torch.full((t.images,), float(n)))
                assert (state.reduction.group >= 0).all()
            for i in range(t.images):
                output(model, pixels[i : i + 1])
                alone = session.report().kept
                assert not alone or alone[0].tolist() == kept[i]
        assert snapshot(model) == before
        torch.testing.assert_close(output(model, pixels), stock, rtol=0, atol=0)
        with vtc.compressing(model, seeded(t.method, Fraction(1), 0)):
            torch.testing.assert_close(output(model, pixels), stock, rtol=0, atol=0)
    except (ValueError, vtc.UnsupportedError) as error:
        if not known(error):
            raise
    assert snapshot(model) == before


@torch.no_grad()
def test_forward_features_of_timm_had_nothing_to_report() -> None:
    model, pixels = mini._timm(), mini.images()
    with vtc.compressing(model, "tome", keep_ratio=0.5) as session:
        model.forward_features(pixels)
        assert session.report().final_tokens == 32


@torch.no_grad()
def test_two_tokens_of_equal_energy_were_told_apart_by_rounding() -> None:
    """PiToMe from 4 patches to 1: the last two are as far from each other, alone or in a batch."""
    model, pixels = build(Tower("siglip", 2, 2, 2, 3, "pitome", 1)), mini.images(3, size=8)
    with vtc.compressing(model, "pitome", keep_tokens=1) as session:
        output(model, pixels)
        together = [k.tolist() for k in session.report().kept]
        for i in range(3):
            output(model, pixels[i : i + 1])
            assert session.report().kept[0].tolist() == together[i]
