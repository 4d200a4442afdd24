# SPDX-License-Identifier: Apache-2.0
"""Adapters of every encoder, and every method on every encoder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from encoder_cases import Rows
from mini import DEPTH, ENCODERS, GRID, HEADS, HF_VISION, PATCH, SIZE, TIMM, WIDTH, images
from snapshot import snapshot
from torch import Tensor, nn

import vtc
from vtc.adapters.locate import locate_vision
from vtc.benchmarks.shared.budgets import seeded
from vtc.engine.vision.engine import VisionEngine
from vtc.errors import UnsupportedError
from vtc.method import Method

N = GRID * GRID
ALL = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- what adapters say ---------------------------------------------------------------------------


@ALL
def test_sites(name: str) -> None:
    mini = ENCODERS[name]
    sites = locate_vision(mini())
    assert len(sites.blocks) == DEPTH and sites.width == WIDTH and sites.patch == PATCH
    assert sites.has_cls == mini.has_cls
    assert (sites.pool in ("mean", "map")) == mini.pooled
    assert (sites.resize is not None) == mini.resizes
    prefix = {"timm-deit-distilled": 2, "timm-dinov2-reg": 4, "timm-eva-mixed": 3}
    assert sites.prefix == prefix.get(name, 3 if name == "hf-dinov2-reg" else int(mini.has_cls))
    assert sites.mlp_width in (64, 128)
    assert all(b.heads == HEADS for b in sites.blocks)


def real_attention(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[tuple]:
    """Queries, keys and probabilities of every attention call, from torch itself."""
    calls: list[tuple] = []
    stock = nn.functional.scaled_dot_product_attention

    def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any):
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        scores = q @ k.transpose(-1, -2) * scale
        calls.append((k, (scores if attn_mask is None else scores + attn_mask).softmax(-1), scores))
        return stock(q, k, v, attn_mask, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", sdpa)
    return calls


UNFUSED = ("timm-vit-unfused", "hf-clip-eager", "hf-blip", "hf-blip-retrieval")
FUSED = [n for n in ENCODERS if n not in UNFUSED]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("merge", [False, True])
def test_views_show_the_real_attention(
    name: str, merge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and probabilities, recomputed or captured, are those that attention used."""
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    seen: list[dict[str, Tensor]] = []
    chain = (
        (Rows(seen=seen), vtc.methods()["tome"](keep_ratio=0.4)) if merge else (Rows(seen=seen),)
    )
    engine = VisionEngine(sites, chain, DEPTH - 1, None)
    engine.install()
    with torch.enable_grad():  # keeps nn.MultiheadAttention off its own kernel
        calls = real_attention(monkeypatch, model)
        mini.run(model, pixels)
    engine.remove()
    real = calls[:DEPTH] if len(calls) < 2 * DEPTH else calls  # heads may attend as well
    for view, (key, probabilities, _) in zip(seen[:DEPTH], real[:DEPTH], strict=True):
        torch.testing.assert_close(view["key"], key, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(view["mean"], key.mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(view["again"], key.mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(view["attention"], probabilities, atol=1e-5, rtol=1e-4)
        if mini.has_cls:
            torch.testing.assert_close(view["cls"], probabilities[:, :, 0], atol=1e-5, rtol=1e-4)
    if merge:
        assert seen[0]["key"].shape[2] > seen[DEPTH - 1]["key"].shape[2]


@pytest.mark.parametrize("name", FUSED)
def test_features_views_show_the_real_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    p, seen = sites.prefix, []
    engine = VisionEngine(sites, (Rows(seen=seen, behind=True),), DEPTH - 1, None)
    engine.install()
    with torch.enable_grad():
        calls = real_attention(monkeypatch, model)
        mini.run(model, pixels)
    engine.remove()
    assert not engine.state.projections
    for view, (key, probabilities, scores) in zip(seen[:DEPTH], calls[:DEPTH], strict=True):
        same = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
        same(view["key"], key[:, :, p:].transpose(1, 2))
        same(view["received"], probabilities.mean((1, 2))[:, p:])
        if mini.has_cls:
            same(view["cls"], probabilities[:, :, 0, p:])
            same(view["logits"], scores[:, :, 0, p:])


def test_eager_attention_weights() -> None:
    """The rows that Hugging Face gives itself."""
    model = ENCODERS["hf-clip-eager"]()
    inside: list[dict[str, Tensor]] = []
    behind: list[dict[str, Tensor]] = []
    chain = (Rows(seen=inside), Rows(seen=behind, behind=True))
    engine = VisionEngine(locate_vision(model), chain, DEPTH - 1, None)
    engine.install()
    want = model(images(), output_attentions=True).attentions
    engine.remove()
    for a, b, weights in zip(inside, behind, want, strict=True):
        torch.testing.assert_close(a["attention"], weights, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(a["cls"], weights[:, :, 0], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(b["cls"], weights[:, :, 0, 1:], atol=1e-6, rtol=1e-4)


def test_unfused_attention_weights() -> None:
    model = ENCODERS["timm-vit-unfused"]()
    seen: list[dict[str, Tensor]] = []
    want: list[Tensor] = []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda m, a, out: want.append(out))
    engine = VisionEngine(locate_vision(model), (Rows(seen=seen),), DEPTH - 1, None)
    engine.install()
    model(images())
    engine.remove()
    for view, weights in zip(seen, want, strict=True):
        torch.testing.assert_close(view["attention"], weights, atol=1e-6, rtol=1e-4)


def test_key_mean_without_a_key_projection() -> None:
    """open_clip's joint projection: only the averaged weights are applied."""
    model = ENCODERS["open-clip"]()
    sites = locate_vision(model)
    for site in sites.blocks:
        assert site.key_source is None
        site.key = None  # type: ignore[assignment]
    vtc.methods()["tome"](keep_ratio=0.5)
    engine = VisionEngine(sites, (vtc.methods()["tome"](keep_ratio=0.5),), DEPTH - 1, None)
    engine.install()
    model(images())
    engine.remove()
    assert engine.state.counts[-1] == 33


# ---- what adapters refuse ------------------------------------------------------------------------


def test_unusual_blocks_are_refused() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

    for block in (ParallelScalingBlock, ResPostBlock):
        with pytest.raises(UnsupportedError, match=block.__name__):
            vtc.wrap(VisionTransformer(**TIMM, block_fn=block), "tome")
    with pytest.raises(UnsupportedError, match="EvaBlockPostNorm"):
        vtc.wrap(timm.models.eva.Eva(**TIMM, use_post_norm=True), "tome")
    with pytest.raises(UnsupportedError, match="DiffAttention"):
        vtc.wrap(VisionTransformer(**{**TIMM, "num_heads": 2}, attn_layer="diff"), "tome")
    import open_clip.transformer as oc

    tower = oc.VisionTransformer(SIZE, PATCH, WIDTH, 2, HEADS, 2.0, scaled_cosine_attn=True)
    with pytest.raises(UnsupportedError, match="scaled cosine"):
        vtc.wrap(tower, "tome")
    with pytest.raises(UnsupportedError, match=r"supported: .*Hugging Face encoders"):
        vtc.wrap(timm.create_model("resnet18", num_classes=3), "tome")


def test_patches_that_are_no_squares_are_refused() -> None:
    import open_clip.transformer as oc

    oblong = {"patch_size": (4, 8), "image_size": (SIZE, SIZE)}
    for model in (
        timm.models.vision_transformer.VisionTransformer(**{**TIMM, "patch_size": (4, 8)}),
        oc.VisionTransformer(**oblong, width=WIDTH, layers=2, heads=HEADS, mlp_ratio=2.0),
        hf.InternVLVisionModel(hf.InternVLVisionConfig(**{**HF_VISION, **oblong})),
    ):
        with pytest.raises(UnsupportedError, match=r"patches of .*4.*8.* pixels; only square ones"):
            vtc.wrap(model, "tome")


def test_blocks_with_a_part_missing_are_refused() -> None:
    model = ENCODERS["hf-clip"]()
    del locate_vision(model).blocks[1].module.layer_norm2
    with pytest.raises(UnsupportedError, match=r"CLIPEncoderLayer has other parts than"):
        vtc.wrap(model, "tome")


def test_a_mask_of_patches_is_refused_where_tokens_merge() -> None:
    model, mask = ENCODERS["hf-clip"](), torch.ones(2, 1, 1, N + 1, dtype=torch.bool)
    mask[..., 30:] = False
    stock = model(pixel_values=images(), attention_mask=mask).last_hidden_state
    with vtc.compressing(model, "random", keep_ratio=0.5) as session:
        got = model(pixel_values=images(), attention_mask=mask).last_hidden_state
        kept = session.vision.state.reduction.select(stock[:, 1:])
        torch.testing.assert_close(got[:, 1:], kept)
    with (
        vtc.compressing(model, "tome", keep_ratio=0.5),
        pytest.raises(UnsupportedError, match="an attention_mask of all patches does not fit"),
    ):
        model(pixel_values=images(), attention_mask=mask)


def test_attention_kernels_without_masks_are_refused_for_proportional_attention() -> None:
    model = ENCODERS["hf-clip"]()
    for config in {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }.values():
        config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match='attn_implementation="sdpa"'):
        vtc.wrap(model, "tome")


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_adapters_do_not_import_their_libraries(library: str) -> None:
    code = (
        "import sys, torch; from vtc.adapters import hf_vision, open_clip_vit, timm_vit\n"
        "assert all(a.locate(torch.nn.Linear(1, 1)) is None for a in (hf_vision, open_clip_vit, timm_vit))\n"
        f"assert {library!r} not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_timm_model_inside_open_clip() -> None:
    from open_clip.timm_model import TimmModel

    tower = TimmModel("vit_tiny_patch16_224", embed_dim=8, pool="token").eval()
    sites = locate_vision(tower)
    assert sites.tower is tower.trunk and len(sites.blocks) == 12
    vtc.wrap(tower, "tome", keep_ratio=0.5)
    tower(images(1, size=224))
    assert tower.vtc.vision.state.counts[-1] == 99


def test_attention_that_pools_sees_every_token() -> None:
    """open_clip's attentional pooling: merged tokens count as often as they stand for."""
    from mini import _open_clip, loud

    torch.manual_seed(0)
    tower, seen = loud(_open_clip(attentional_pool=True)), []
    assert locate_vision(tower).pool == "map"
    tower.attn_pool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vtc.wrap(tower, "tome", keep_ratio=0.5)
    tower(images())
    assert tower.vtc.report().final_tokens == 32
    assert seen[0].shape == (2, N + 1, WIDTH)
    assert all(len(row.unique(dim=0)) == 32 + 1 for row in seen[0])


def test_rotary_tables_of_the_tokens_that_are_left() -> None:
    """Shared by all, by head, or by image, as where timm drops patches in training; or none."""
    from mini import _timm, loud
    from timm.models.eva import Eva

    from vtc.adapters.timm_vit import _gather

    keep, table = torch.tensor([[0, 2, 5], [0, 1, 3]]), torch.randn(6, 4)
    want = table[torch.tensor([[1, 4], [0, 2]])][:, None]  # behind a class token
    for rope in (table, table[None], table.expand(2, 1, 6, 4)):
        _, kwargs = _gather(1, ((), {"rope": rope, "other": 1}), keep)
        assert torch.equal(kwargs["rope"], want) and kwargs["other"] == 1
    other = table.flip(0)
    _, kwargs = _gather(1, ((), {"rope": torch.stack([table, other])[:, None]}), keep)
    assert torch.equal(kwargs["rope"], torch.stack([want[0], other[[0, 2]][None]]))
    torch.manual_seed(0)
    model = loud(_timm(Eva, use_rot_pos_emb=False))
    vtc.wrap(model, "tome", keep_ratio=0.5)
    assert last_tokens(model, partial(model, images())).shape[1] == N + 1  # refilled for the head
    assert model.vtc.report().final_tokens == 32


@pytest.mark.parametrize("cls", [hf.CLIPForImageClassification, hf.SiglipForImageClassification])
def test_classifiers_that_average(cls: type) -> None:
    from mini import clip_config, siglip_config

    if cls is hf.CLIPForImageClassification:
        config = hf.CLIPConfig(vision_config=clip_config().to_dict())
    else:
        config = hf.SiglipConfig(vision_config=siglip_config().to_dict())
    model = cls(config).eval()
    assert locate_vision(model).pool == "mean"
    vtc.wrap(model, "tome", keep_ratio=0.5)
    assert model(pixel_values=images()).logits.shape == (2, 2)


# ---- every method on every encoder ---------------------------------------------------------------

ENCODER_STAGES = {"pixels", "vision", "features"}
METHODS = [m for m in sorted(vtc.methods()) if seeded(m, None, 0).stages <= ENCODER_STAGES]
LLM_METHODS = sorted(vtc.methods().keys() - set(METHODS))


def unsupported(name: str, method: Method) -> str | None:
    """Why the pair cannot work."""
    mini = ENCODERS[name]
    if "frames" in method.needs:
        return "frames of a video"
    if "cls" in method.needs and not mini.has_cls:
        return r"\[CLS\]"
    if "pixels" in method.stages and not mini.resizes:
        return "one size"
    return None


@pytest.mark.parametrize("method", LLM_METHODS)
@pytest.mark.parametrize("name", ["hf-clip", "timm-vit", "open-clip"])
def test_methods_of_the_language_model_are_refused(name: str, method: str) -> None:
    model = ENCODERS[name]()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="language model"):
        vtc.wrap(model, seeded(method, None, 0))
    assert snapshot(model) == before


def pair(name: str, method: str, keep: Fraction | int) -> tuple[Any, Method]:
    made = seeded(method, keep, 0)
    reason = unsupported(name, made)
    if reason is not None:
        model = ENCODERS[name]()
        before = snapshot(model)
        with pytest.raises(UnsupportedError, match=reason):
            vtc.wrap(model, made)
        assert snapshot(model) == before
        return None, made
    return ENCODERS[name](), made


@ALL
@pytest.mark.parametrize("method", METHODS)
def test_full_budget_and_unwrap_give_the_stock_model(name: str, method: str) -> None:
    model, made = pair(name, method, Fraction(1))
    if model is None:
        return
    mini, pixels = ENCODERS[name], images()
    stock = mini.run(model, pixels)
    before = snapshot(model)
    vtc.wrap(model, made)
    full = mini.run(model, pixels)
    vtc.unwrap(model)
    assert all(torch.equal(full[k], stock[k]) for k in stock)
    assert snapshot(model) == before
    vtc.wrap(model, seeded(method, Fraction(1, 2), 0))
    mini.run(model, pixels)
    vtc.unwrap(model)
    assert snapshot(model) == before
    assert all(torch.equal(v, stock[k]) for k, v in mini.run(model, pixels).items())


@ALL
@pytest.mark.parametrize("method", METHODS)
def test_tokens_asked_are_tokens_kept_are_tokens_reported(name: str, method: str) -> None:
    for budget in (Fraction(1, 2), 23):
        model, made = pair(name, method, budget)
        if model is None:
            return
        mini, pixels = ENCODERS[name], images()
        stock = last_tokens(model, partial(mini.run, model, pixels))
        vtc.wrap(model, made)
        sites = locate_vision(model)
        asked = made.budget(N, (GRID, GRID))
        assert asked == (23 if budget == 23 else 32) or method == "downsample"
        got = last_tokens(model, partial(mini.run, model, pixels))
        state, report = model.vtc.vision.state, model.vtc.report()
        assert state.reduction.count == asked == report.final_tokens == report.asked
        assert [len(k) for k in report.kept] == [asked] * 2
        refilled = made.merges and mini.pooled
        total = state.entered - sites.prefix if refilled else asked
        assert got.shape[1] == total + sites.prefix
        size = state.size.sum(1)
        if made.merges:
            assert torch.equal(size, torch.full((2,), float(N)))
            assert (state.reduction.group >= 0).all()
        elif "pixels" not in made.stages:
            assert torch.equal(size, torch.full((2,), float(asked)))
        if made.stages == {"features"} and not made.merges:
            # Pruning behind the encoder: the survivors are exactly the stock tokens.
            p = sites.prefix
            assert torch.equal(got[:, :p], stock[:, :p])
            assert torch.equal(got[:, p:], state.reduction.select(stock[:, p:]))


@ALL
@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_batch_mates(name: str, method: str) -> None:
    model, made = pair(name, method, Fraction(2, 5))
    if model is None:
        return
    mini = ENCODERS[name]
    a, b = images(2, seed=1), images(2, seed=2)
    vtc.wrap(model, made)
    run = {}
    for key, pixels in {
        "ab": torch.stack([a[0], b[0]]),
        "aa": a,
        "ba": torch.stack([b[0], a[0]]),
    }.items():
        run[key] = last_tokens(model, partial(mini.run, model, pixels))
        run[key + " kept"] = model.vtc.vision.state.reduction.keep
    for other, row in (("aa", 0), ("ba", 1)):
        assert torch.equal(run["ab kept"][0], run[other + " kept"][row])
        torch.testing.assert_close(run["ab"][0], run[other][row], atol=1e-4, rtol=1e-4)


def last_tokens(model: nn.Module, run: Any) -> Tensor:
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    block = locate_vision(model).blocks[-1].module
    handle = block.register_forward_hook(see)
    run()
    handle.remove()
    return seen[0]


@pytest.mark.slow
def test_a_wrapped_encoder_compiles_to_one_graph() -> None:
    model, pixels = ENCODERS["timm-vit"](), images()
    vtc.wrap(model, "pitome", keep_ratio=0.5)
    want = model(pixels)
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager", fullgraph=True)(pixels)
    torch._dynamo.reset()
    torch.testing.assert_close(got, want)
