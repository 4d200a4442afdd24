# SPDX-License-Identifier: Apache-2.0
"""The vision engine on every encoder, against blocks computed step by step without any hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from mini import DEPTH, ENCODERS, GRID, PATCH, SIZE, WIDTH, images
from snapshot import snapshot
from torch import Tensor, nn

from vtc.adapters.base import BlockSites, VisionSites
from vtc.adapters.locate import locate_vision
from vtc.engine.encoding import without_prefix
from vtc.engine.vision.engine import VisionEngine
from vtc.engine.vision.reductions import resample
from vtc.errors import UnsupportedError
from vtc.method import Method
from vtc.reduction import Reduction

N = GRID * GRID
LAST = DEPTH - 1


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- methods of these tests ----------------------------------------------------------------------


def _order(batch: int, prefix: int, t: int, layer: int) -> Tensor:
    """Patch places (batch, t - prefix) in an arbitrary order of each image's own."""
    g = torch.Generator().manual_seed(100 * layer + t)
    return torch.stack([torch.randperm(t - prefix, generator=g) for _ in range(batch)]) + prefix


@dataclass(frozen=True, kw_only=True)
class Fold(Method):
    """Fold r arbitrary patches of each image into arbitrary others, in every block."""

    r: int = 9
    blocks: tuple[int, ...] = tuple(range(DEPTH))
    vision_site: Literal["middle", "output"] = "middle"  # type: ignore[misc]
    proportional_attention: bool = False
    track_size: bool = True
    name = "test-fold"
    merges = True

    def into(self, batch: int, prefix: int, t: int, layer: int) -> Tensor:
        order = _order(batch, prefix, t, layer)
        into = torch.arange(t).repeat(batch, 1)
        # Five receivers, so that groups have more than two members.
        return into.scatter(1, order[:, : self.r], order[:, self.r :][:, torch.arange(self.r) % 5])

    def on_vision_layer(self, v: Any) -> Reduction | None:
        if v.layer not in self.blocks:
            return None
        batch, t = v.x.shape[:2]
        return Reduction.from_merge(self.into(batch, v.prefix, t, v.layer))


@dataclass(frozen=True, kw_only=True)
class Drop(Method):
    """Drop r arbitrary patches of each image (image b drops r + b if ragged)."""

    r: int = 9
    blocks: tuple[int, ...] = (1, 3)
    ragged: bool = False
    vision_site: Literal["middle", "output"] = "middle"  # type: ignore[misc]
    name = "test-drop"

    def on_vision_layer(self, v: Any) -> Reduction | None:
        if v.layer not in self.blocks:
            return None
        batch, t = v.x.shape[:2]
        keep = torch.ones(batch, t, dtype=torch.bool)
        for b, order in enumerate(_order(batch, v.prefix, t, v.layer)):
            keep[b, order[: self.r + b * self.ragged]] = False
        return Reduction.from_mask(keep)


@dataclass(frozen=True, kw_only=True)
class ShowViews(Method):
    """Change nothing; show every view to a function."""

    see: Callable[[Any], Any]
    layers: tuple[int, ...] = ()
    name = "test-look"

    def captures(self, depth: int) -> tuple[int, ...]:
        return self.layers

    def on_vision_layer(self, v: Any) -> None:
        self.see(v)


@dataclass(frozen=True, kw_only=True)
class LookBehind(ShowViews):
    name = "test-look-behind"

    def on_vision_layer(self, v: Any) -> None:
        raise AssertionError("not inside")

    def on_features(self, v: Any) -> None:
        self.see(v)

    @property
    def stages(self) -> frozenset:
        return frozenset({"features"})


@dataclass(frozen=True, kw_only=True)
class Behind(Method):
    """Keep the patches of a mask (B, N) behind the encoder."""

    mask: Any
    name = "test-behind"

    def on_features(self, v: Any) -> Reduction:
        return Reduction.from_mask(self.mask[:, : v.count])


@dataclass(frozen=True, kw_only=True)
class Smaller(Method):
    grid: tuple[int, int] = (6, 5)
    name = "test-smaller"

    def on_pixels(self, grid: tuple[int, int]) -> tuple[int, int]:
        return self.grid


@contextmanager
def engine(
    sites: VisionSites,
    *methods: Method,
    block: int | None = None,
    projector: nn.Module | None = None,
) -> Iterator[VisionEngine]:
    last = len(sites.blocks) - 1 if block is None else block
    e = VisionEngine(sites, methods, last, projector)
    e.install()
    try:
        yield e
    finally:
        e.remove()


def last_block(sites: VisionSites, run: Callable[[], Any], block: int = LAST) -> Tensor:
    """Output of a block, behind all hooks that are installed now."""
    seen = []

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = sites.blocks[block].module.register_forward_hook(see)
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def close(a: Tensor, b: Tensor, rel: float = 1e-5) -> None:
    scale = b.abs().max().item()
    worst = (a - b).abs().max().item()
    assert worst <= rel * scale, f"{worst:.3g} of {scale:.3g}"


ALL = pytest.mark.parametrize("name", ENCODERS)
# One of each family: what does not depend on the attention variant.
SOME = pytest.mark.parametrize("name", ["timm-eva", "hf-clip", "hf-siglip", "open-clip"])


# ---- an independent encoder: the blocks' parts called one by one ---------------------------------


def first_call(sites: VisionSites, run: Callable[[], Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments of every block call: here only rotary tables differ from block to block."""
    calls = []
    handles = [
        s.module.register_forward_pre_hook(
            lambda m, a, k: calls.append((a, dict(k))), with_kwargs=True
        )
        for s in sites.blocks
    ]
    run()
    for h in handles:
        h.remove()
    return calls


def part(block: nn.Module, *names: str) -> Any:
    return next((getattr(block, n) for n in names if getattr(block, n, None) is not None), None)


def scaled(gain: Any, x: Tensor) -> Tensor:
    if gain is None:
        return x
    return gain(x) if isinstance(gain, nn.Module) else gain * x


def attend(site: BlockSites, x: Tensor, bias: Tensor | None, rope: Tensor | None) -> Tensor:
    """x + f(attn(norm1(x))) with a key bias (B, T)."""
    block, attn = site.module, site.attn
    y = part(block, "norm1", "layer_norm1", "layernorm_before", "ln_1")(x)
    mask = None if bias is None else bias[:, None, None, :]
    if isinstance(attn, nn.MultiheadAttention):
        mask = None if mask is None else mask.expand(-1, attn.num_heads, x.shape[1], -1)
        mask = None if mask is None else mask.flatten(0, 1)
        y = attn(y, y, y, need_weights=False, attn_mask=mask)[0]
    elif hasattr(attn, "qkv") and hasattr(attn, "projection"):  # BLIP takes no mask
        q, k, v = attn.qkv(y).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * attn.scale
        y = (scores if mask is None else scores + mask).softmax(-1) @ v
        y = attn.projection(y.transpose(1, 2).flatten(2))
    elif type(attn).__module__.startswith("transformers"):
        y = attn(y, attention_mask=mask)[0]
    elif type(attn).__module__.startswith("open_clip") or rope is None:
        y = attn(y, attn_mask=mask)
    else:
        y = attn(y, rope=rope, attn_mask=mask)
    return x + scaled(part(block, "ls1", "gamma_1", "layer_scale1", "ls_1"), y)


def think(site: BlockSites, x: Tensor) -> Tensor:
    """x + g(mlp(norm2(x)))."""
    gain = part(site.module, "ls2", "gamma_2", "layer_scale2", "ls_2")
    return x + scaled(gain, site.mlp(site.norm2(x)))


def rope_of(table: Tensor | None, place: list[list[int]], prefix: int) -> Tensor | None:
    """Rotary tables (B, 1 or H, K, d) of each image's own tokens."""
    if table is None:
        return None
    rows = [[i - prefix for i in row[prefix:]] for row in place]
    table = table if table.dim() == 3 else table[None]
    return torch.stack([table[:, row] for row in rows])


@dataclass
class Explicit:
    x: Tensor
    size: Tensor
    place: list[list[int]]  # original place of every token
    counts: list[int]


def explicit(sites: VisionSites, run: Callable[[], Any], method: Fold | Drop) -> Explicit:
    """The whole encoder without hooks; tokens in Python lists."""
    calls = first_call(sites, run)
    x = calls[0][0][0]
    batch, t = x.shape[:2]
    size = torch.ones(batch, t)
    place = [list(range(t)) for _ in range(batch)]
    counts, merged = [], False

    def reduce(x: Tensor, layer: int) -> Tensor:
        nonlocal size, place, merged
        if layer not in method.blocks:
            return x
        t = x.shape[1]
        rows, sizes, places = [], [], []
        for b in range(batch):
            if isinstance(method, Fold):
                into = method.into(batch, sites.prefix, t, layer)[b].tolist()
            else:
                gone = set(_order(batch, sites.prefix, t, layer)[b, : method.r].tolist())
                into = [-1 if i in gone else i for i in range(t)]
            out, s = [], []
            for i in range(t):
                if into[i] != i:
                    continue
                members = [j for j in range(t) if into[j] == i]
                weight = size[b, members]
                out.append((x[b, members] * weight[:, None]).sum(0) / weight.sum())
                s.append(weight.sum())
            rows.append(torch.stack(out))
            sizes.append(torch.stack(s))
            places.append([place[b][i] for i in range(t) if into[i] == i])
        merged = merged or isinstance(method, Fold)
        place = places
        keeps = isinstance(method, Fold) and not method.track_size
        size = torch.ones(batch, len(sizes[0])) if keeps else torch.stack(sizes)
        return torch.stack(rows)

    for layer, site in enumerate(sites.blocks):
        rope = calls[layer][1].get("rope")
        if rope is not None and layer:
            rope = rope_of(rope, place, sites.prefix)
        prop = merged and getattr(method, "proportional_attention", False)
        x = attend(site, x, size.log() if prop else None, rope)
        if method.vision_site == "middle":
            x = reduce(x, layer)
        x = think(site, x)
        if method.vision_site == "output":
            x = reduce(x, layer)
        counts.append(x.shape[1])
    return Explicit(x, size, place, counts)


@ALL
@pytest.mark.parametrize("site", ["middle", "output"])
@pytest.mark.parametrize("kind", ["fold", "fold-proportional", "fold-plain-mean", "drop"])
def test_equals_explicit_blocks(name: str, site: str, kind: str) -> None:
    method: Fold | Drop = {
        "fold": Fold(),
        "fold-proportional": Fold(proportional_attention=True),
        "fold-plain-mean": Fold(track_size=False),
        "drop": Drop(),
    }[kind]
    method = replace(method, vision_site=site)  # type: ignore[arg-type]
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    run = partial(mini.run, model, pixels)
    want = explicit(sites, run, method)
    stock = last_block(sites, run)
    with engine(sites, method) as e:
        e.refill = False  # look at the tokens themselves
        got = last_block(sites, run)
    state = e.state
    assert state.counts == want.counts
    close(got, want.x)
    assert (got - stock[:, : got.shape[1]]).abs().max() > 1e-3 * stock.abs().max()
    assert state.tokens.keep.tolist() == want.place
    assert state.reduction.keep.tolist() == [
        [i - sites.prefix for i in row[sites.prefix :]] for row in want.place
    ]
    assert torch.equal(state.sizes, want.size)
    if kind.startswith("fold") and kind != "fold-plain-mean":
        assert torch.equal(state.size.sum(1), torch.full((2,), float(N)))
    # Prefix tokens ([CLS], distillation, registers) survive in front and absorb nothing.
    assert state.tokens.keep[:, : sites.prefix].tolist() == [list(range(sites.prefix))] * 2
    assert not state.projections


# ---- pruning is masking; merging equal tokens is nothing -----------------------------------------


@ALL
@pytest.mark.parametrize("site", ["middle", "output"])
def test_dropping_is_masking(name: str, site: str) -> None:
    """A token dropped in block l: no later block sees it as a key."""
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    run = partial(mini.run, model, pixels)
    method = Drop(vision_site=site)  # type: ignore[arg-type]
    alive: dict[int, Tensor] = {}

    def see(layer: int, e: VisionEngine) -> None:
        tokens = e.state.tokens
        if tokens is not None:
            alive[layer] = tokens.group >= 0

    with engine(sites, method) as e:
        handles = [
            s.module.register_forward_hook(lambda m, a, o, i=i: see(i, e))
            for i, s in enumerate(sites.blocks)
        ]
        got = last_block(sites, run)
        for h in handles:
            h.remove()
    assert sorted(alive) == [1, 2, 3, 4]

    def mask(layer: int, m: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if layer - 1 not in alive:
            return None
        bias = torch.zeros(alive[layer - 1].shape).masked_fill(~alive[layer - 1], -torch.inf)
        return sites.blocks[layer].bias((args, kwargs), bias)

    handles = [] if sites.install is None else [sites.install()]
    handles += [
        s.attn.register_forward_pre_hook(partial(mask, i), with_kwargs=True)
        for i, s in enumerate(sites.blocks)
    ]
    masked = last_block(sites, run)
    for h in handles:
        h.remove()
    close(got, e.state.tokens.select(masked))
    stock = last_block(sites, run)
    assert (got - e.state.tokens.select(stock)).abs().max() > 1e-3 * stock.abs().max()


@pytest.mark.parametrize("name", [n for n in ENCODERS if "eva" not in n])
@pytest.mark.parametrize("proportional", [True, False])
def test_merged_token_stands_for_identical_ones(name: str, proportional: bool) -> None:
    """With log-size bias, a merged token of size m is m identical tokens. (Not under RoPE.)"""
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    p = sites.prefix
    owner = p + torch.arange(N) // 3 * 3  # patches 3i, 3i+1, 3i+2 become equal
    owner = torch.cat([torch.arange(p), owner])

    def duplicate(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return (args[0][:, owner], *args[1:]), kwargs

    @dataclass(frozen=True, kw_only=True)
    class MergeEqual(Fold):
        proportional_attention: bool = proportional

        def into(self, batch: int, prefix: int, t: int, layer: int) -> Tensor:
            return owner.expand(batch, -1)

    handle = sites.blocks[0].module.register_forward_pre_hook(duplicate, with_kwargs=True)
    run = partial(mini.run, model, pixels)
    stock = last_block(sites, run)
    whole = mini.run(model, pixels)
    with engine(sites, MergeEqual(blocks=(0,))) as e:
        e.refill = False
        got = last_block(sites, run)
        e.refill = sites.pool in ("mean", "map")
        pooled = mini.run(model, pixels)
    handle.remove()
    want = e.state.tokens.select(stock)
    if not proportional:
        assert (got - want).abs().max() > 1e-3 * stock.abs().max()
        return
    close(got, want)
    for key, value in pooled.items():
        if value.shape == whole[key].shape:
            close(value, whole[key], 2e-5)  # heads that average or attend: refilled


# ---- budgets, batches, failures ------------------------------------------------------------------


@ALL
def test_nothing_to_do_is_the_stock_model(name: str) -> None:
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    stock = mini.run(model, pixels)
    before = snapshot(model)
    sites = locate_vision(model)
    looks: list[Any] = []
    with engine(sites, Fold(blocks=()), ShowViews(see=looks.append)) as e:
        out = mini.run(model, pixels)
        assert e.state.reduction is None
        assert e.state.counts == [N + sites.prefix] * DEPTH
    assert len(looks) % DEPTH == 0 and looks
    assert all(torch.equal(out[k], stock[k]) for k in stock)
    assert snapshot(model) == before
    with engine(sites, Fold(r=5), Drop(), Behind(mask=torch.ones(2, N, dtype=torch.bool))):
        mini.run(model, pixels)
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert all(torch.equal(v, stock[k]) for k, v in mini.run(model, pixels).items())


@ALL
def test_ragged_images_do_not_see_each_other(name: str) -> None:
    """Images that keep different numbers of tokens: each as if it were alone."""
    mini = ENCODERS[name]
    model, pixels = mini(), images(2)
    sites = locate_vision(model)
    with engine(sites, Drop(ragged=True)) as e:
        got = last_block(sites, partial(mini.run, model, pixels))
    assert e.state.reduction.counts.tolist() == [N - 18, N - 20]
    assert e.state.counts == [N, N - 9, N - 9, N - 18, N - 18] or sites.prefix
    valid = e.state.tokens.valid
    kept = {b: e.state.tokens.keep[b][valid[b]] for b in range(2)}

    @dataclass(frozen=True, kw_only=True)
    class Alone(Drop):
        b: int = 0

        def on_vision_layer(self, v: Any) -> Reduction | None:
            if v.layer not in self.blocks:
                return None
            # The same places as in the batch, whose rows were padded to the longest.
            gone = _order(2, v.prefix, N + v.prefix if v.layer == 1 else N - 9 + v.prefix, v.layer)
            keep = torch.ones(1, v.x.shape[1] + self.b * (v.layer == 3), dtype=torch.bool)
            keep[0, gone[self.b, : self.r + self.b]] = False
            return Reduction.from_mask(keep[:, : v.x.shape[1]])

    # Alone, image 0 has the rows of the batch; image 1 has them up to its padding slot.
    with engine(sites, Alone(b=0)) as e:
        alone = last_block(sites, lambda: model_run_one(mini, model, pixels[:1]))
    assert torch.equal(e.state.tokens.keep[0], kept[0])
    close(got[:1], alone)
    if (
        N - 9 + sites.prefix - 1
        in _order(2, sites.prefix, N - 9 + sites.prefix, 3)[1, :10].tolist()
    ):
        return  # the padding slot was among those to drop: then it drops one patch less
    with engine(sites, Alone(b=1)) as e:
        alone = last_block(sites, lambda: model_run_one(mini, model, pixels[1:]))
    assert torch.equal(e.state.tokens.keep[0], kept[1])
    close(got[1:, : alone.shape[1]], alone)


def model_run_one(mini: Any, model: nn.Module, pixels: Tensor) -> None:
    mini.run(model, pixels)


@SOME
def test_a_crashed_forward_leaves_nothing_behind(name: str) -> None:
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    bad: list[str] = []

    def see(v: Any) -> None:
        if bad and v.layer == 2:
            raise RuntimeError(bad[0])

    with engine(sites, Fold(proportional_attention=True), ShowViews(see=see)):
        want = mini.run(model, pixels)
        bad.append("crash")
        with pytest.raises(RuntimeError, match="crash"):
            mini.run(model, pixels)
        # And in the MLP, between shortening and putting back.
        handle = sites.blocks[1].mlp.register_forward_pre_hook(lambda m, a: 1 / 0)
        bad.clear()
        with pytest.raises(ZeroDivisionError):
            mini.run(model, pixels)
        handle.remove()
        got = mini.run(model, pixels)
        other = mini.run(model, images(2, seed=5))
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert not any(torch.equal(other[k], want[k]) for k in want)


def test_errors_before_anything_is_computed() -> None:
    @dataclass(frozen=True, kw_only=True)
    class NeedsCls(Drop):
        name = "test-needs-cls"
        needs = frozenset({"cls"})

    no_cls = locate_vision(ENCODERS["hf-siglip"]())
    with pytest.raises(UnsupportedError, match=r"test-needs-cls needs a \[CLS\].*do without.*tome"):
        VisionEngine(no_cls, (NeedsCls(),), LAST, None)
    fixed = locate_vision(ENCODERS["timm-vit-fixed-size"]())
    with pytest.raises(UnsupportedError, match=r"dynamic_img_size=True.*tome"):
        VisionEngine(fixed, (Smaller(),), LAST, None)
    flash = locate_vision(ENCODERS["hf-clip"]())
    flash = replace(flash, blocks=[replace(b, bias=None) for b in flash.blocks])
    with pytest.raises(UnsupportedError, match="proportional_attention=False"):
        VisionEngine(flash, (Fold(proportional_attention=True),), LAST, None)
    VisionEngine(flash, (Fold(),), LAST, None)
    with (
        engine(flash, Drop(ragged=True)),
        pytest.raises(UnsupportedError, match="different numbers"),
    ):
        flash.tower(images())
    grows = locate_vision(ENCODERS["hf-clip"]())
    with engine(grows, Smaller(grid=(9, 4))), pytest.raises(ValueError, match="larger than"):
        grows.tower(images())


# ---- what views show -----------------------------------------------------------------------------


@SOME
def test_chained_methods_see_what_is_left(name: str) -> None:
    """Keys, attention and notes of the second method fit the tokens that the first one left."""
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    p, seen, stock = sites.prefix, {}, {}

    def see(v: Any) -> None:
        if v.layer != 0:
            return
        t = v.x.shape[1]
        assert v.key.shape[2] == v.attention.shape[2] == v.attention.shape[3] == t
        assert v.count == t - p and v.total == N and v.depth == DEPTH
        seen.update(size=v.size, key=v.key, mean=v.key_mean, rows=v.attention)

    def see_stock(v: Any) -> None:
        if v.layer == 0:
            stock.update(key=v.key, rows=v.attention)

    fold = Fold(blocks=(0,))
    with engine(sites, ShowViews(see=see_stock), fold, ShowViews(see=see)):
        mini.run(model, pixels)
    into = fold.into(2, p, N + p, 0)
    r = Reduction.from_merge(into)
    close(seen["key"], r.merge(stock["key"].transpose(1, 2).flatten(2))[0]
          .unflatten(2, (seen["key"].shape[1], -1)).transpose(1, 2))  # fmt: skip
    close(seen["mean"], seen["key"].mean(1))
    close(seen["rows"].sum(-1), torch.ones_like(seen["rows"][..., 0]))
    assert torch.equal(seen["size"], r.sum(torch.ones(2, N + p)))


@SOME
def test_notes_follow_the_tokens(name: str) -> None:
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    p, seen = sites.prefix, []

    def see(v: Any) -> None:
        t = v.x.shape[1]
        if v.layer == 0:
            v.scratch["place"] = torch.arange(t).expand(2, -1)
            v.scratch["pair"] = torch.arange(t).expand(2, -1)[..., None].repeat(1, 1, 2)
        else:
            assert v.scratch["pair"].shape == (2, t, 2)
            seen.append(v.scratch["place"])

    def see_behind(v: Any) -> None:
        assert v.scratch == {}
        v.scratch["late"] = torch.arange(v.count).expand(2, -1)
        assert v.index.shape == (2, v.count) == v.size.shape
        seen.append(v.index)

    mask = torch.rand(1, N, generator=torch.Generator().manual_seed(0)).expand(2, -1) < 0.5
    chain = (ShowViews(see=see), Fold(), LookBehind(see=see_behind), Behind(mask=mask))
    with engine(sites, *chain) as e:
        mini.run(model, pixels)
        state = e.state
    index = seen[-1]
    left = mask[:, : index.shape[1]]
    k = int(left[0].sum())
    assert torch.equal(state.reduction.keep, index[left].view(2, k))
    notes = state.scratch
    assert torch.equal(notes[0]["place"] - p, state.reduction.keep)
    assert torch.equal(notes[0]["pair"][..., 1] - p, state.reduction.keep)
    assert torch.equal(notes[2]["late"], left.nonzero()[:, 1].view(2, k))
    assert notes[1] == notes[3] == {}
    assert state.size.shape == (2, k)


def test_encoder_methods_have_been_called_in_order() -> None:
    seen: list[tuple[str, int]] = []
    mini = ENCODERS["timm-vit"]
    model = mini()
    first = ShowViews(see=lambda v: seen.append(("a", v.layer)))
    second = ShowViews(see=lambda v: seen.append(("b", v.layer)))
    with engine(locate_vision(model), first, second):
        model(images())
    assert seen == [(s, i) for i in range(DEPTH) for s in "ab"]


def test_timm_forward_features_starts_afresh() -> None:
    """timm's other ways in bypass the module's forward."""
    mini = ENCODERS["timm-vit"]
    model = mini()
    with engine(locate_vision(model), Fold(proportional_attention=True)) as e:
        want = model.forward_features(images(3, seed=2))
        model.forward_features(images(2))
        assert e.state.images == 2
        assert torch.equal(model.forward_features(images(3, seed=2)), want)


# ---- the two ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, m in ENCODERS.items() if m.resizes])
def test_smaller_image(name: str) -> None:
    """Resizing inside equals resizing outside; the tokens stand at the nearest patches."""
    if name.endswith(("-model", "-retrieval")):
        pytest.skip("run() of dual encoders gives no tokens")
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    small = nn.functional.interpolate(
        pixels, (6 * PATCH, 5 * PATCH), mode="bicubic", antialias=True
    )
    if name.startswith("hf") and "dinov2" not in name:
        want = {
            k: v
            for k, v in model(pixel_values=small, interpolate_pos_encoding=True).items()
            if isinstance(v, Tensor)
        }
    else:
        want = mini.run(model, small)
    with engine(sites, Smaller(), Fold(blocks=())) as e:
        got = mini.run(model, pixels)
        state = e.state
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert state.grid == (GRID, GRID) and state.entered == 30 + sites.prefix
    assert state.reduction.count == 30 and state.reduction.source_count == N
    with engine(sites, Smaller(), Fold(blocks=(1,), r=4)) as e:
        mini.run(model, pixels)
        state = e.state
    assert state.counts == [30 + sites.prefix] + [26 + sites.prefix] * 4
    assert state.reduction.keep.shape == (2, 26) and state.size.sum() == 60
    assert (state.reduction.group >= 0).all()


@pytest.mark.parametrize(("n", "m"), [((8, 8), (6, 5)), ((24, 24), (13, 7)), ((5, 9), (5, 1))])
def test_resample_is_a_valid_reduction(n: tuple[int, int], m: tuple[int, int]) -> None:
    r = resample(n, m, 2, "cpu")
    k = m[0] * m[1]
    assert r.keep.shape == (2, k) and r.group.shape == (2, n[0] * n[1])
    assert (r.keep.diff() > 0).all() and int(r.keep.max()) < n[0] * n[1]
    assert torch.equal(r.group.gather(1, r.keep), torch.arange(k).expand(2, -1))
    assert torch.equal(r.group.unique(), torch.arange(k))
    row, column = r.keep[0] // n[1], r.keep[0] % n[1]
    wanted_row = (torch.arange(m[0]) + 0.5) * n[0] / m[0] - 0.5
    assert ((row.view(m)[:, 0] - wanted_row).abs() <= 0.5 + 1e-6).all()
    wanted_column = (torch.arange(m[1]) + 0.5) * n[1] / m[1] - 0.5
    assert ((column.view(m)[0] - wanted_column).abs() <= 0.5 + 1e-6).all()


class TowerAndProjector(nn.Module):
    """The encoder side of a LLaVA: features of the last but one block through a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = ENCODERS["hf-clip"]()
        self.projector = nn.Linear(WIDTH, 12)

    def forward(self, pixels: Tensor) -> Tensor:
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        return self.projector(states[-2][:, 1:])


@pytest.fixture(params=["fresh", "has run before"])
def llava(request: pytest.FixtureRequest) -> TowerAndProjector:
    torch.manual_seed(1)
    model = TowerAndProjector().eval()
    if request.param != "fresh":  # Hugging Face has installed its recording hooks by then
        model(images())
    return model


def survivors(out: Tensor, keep: list[Tensor]) -> list[Tensor]:
    """Rows at keep; every other row must hold NaN and nothing else."""
    for row, k in zip(out, keep):
        gone = torch.ones(len(row), dtype=torch.bool)
        gone[k] = False
        assert row[gone].isnan().all() and not row[k].isnan().any()
    return [row[k] for row, k in zip(out, keep)]


def test_projected_survivors_stand_at_their_places(llava: TowerAndProjector) -> None:
    sites, pixels = locate_vision(llava.tower), images()
    stock = llava(pixels)
    mask = torch.rand(2, N, generator=torch.Generator().manual_seed(0)) < 0.4
    assert mask[0].sum() != mask[1].sum()  # ragged
    seen: list[int] = []
    handle = llava.projector.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))
    with engine(sites, Behind(mask=mask), block=DEPTH - 2, projector=llava.projector) as e:
        out = llava(pixels)
        keep = [mask[b].nonzero()[:, 0] for b in range(2)]
        for got, want, k in zip(survivors(out, keep), stock, keep):
            close(got, want[k])
        assert e.state.counts == [N + 1] * DEPTH
        assert torch.equal(e.state.reduction.counts, mask.sum(1))
    handle.remove()
    everything = torch.ones(2, N, dtype=torch.bool)
    with engine(sites, Behind(mask=everything), block=DEPTH - 2, projector=llava.projector):
        assert torch.equal(llava(pixels), stock)
    assert torch.equal(llava(pixels), stock)


def test_merged_inside_then_pruned_behind(llava: TowerAndProjector) -> None:
    sites, pixels = locate_vision(llava.tower), images()
    fold = Fold(r=7, proportional_attention=True)
    want = explicit_features(sites, partial(llava, pixels), fold, DEPTH - 2)
    mask = torch.rand(1, N, generator=torch.Generator().manual_seed(3)).expand(2, -1) < 0.5
    projected: list[Tensor] = []
    chain = (fold, LookBehind(see=lambda v: projected.append(v.projected)), Behind(mask=mask))
    with engine(sites, *chain, block=DEPTH - 2, projector=llava.projector) as e:
        out = llava(pixels)
    left = N - 7 * (DEPTH - 1)
    # No method acts behind the feature block, whose tokens the last block still runs on.
    assert e.state.counts == [N + 1 - 7 * (i + 1) for i in range(DEPTH - 1)] + [left + 1]
    chosen = mask[0, :left].nonzero()[:, 0]
    place = torch.tensor(want.place)[:, 1:][:, chosen] - 1
    got = torch.stack(survivors(out, list(place)))
    close(got, llava.projector(want.x[:, 1:][:, chosen]))
    close(projected[0], llava.projector(want.x[:, 1:]))
    assert torch.equal(e.state.reduction.keep, place)
    assert torch.equal(e.state.size, want.size[:, 1:][:, chosen])


def explicit_features(
    sites: VisionSites, run: Callable[[], Any], method: Fold, block: int
) -> Explicit:
    return explicit(replace(sites, blocks=sites.blocks[: block + 1]), run, method)


def test_smaller_image_before_a_projector(llava: TowerAndProjector) -> None:
    sites, pixels = locate_vision(llava.tower), images()
    with engine(sites, Smaller(), block=DEPTH - 2, projector=llava.projector) as e:
        out = llava(pixels)
    keep = resample((GRID, GRID), (6, 5), 2, "cpu").keep
    assert torch.equal(e.state.reduction.keep, keep)
    got = torch.stack(survivors(out, list(keep)))
    small = nn.functional.interpolate(
        pixels, (6 * PATCH, 5 * PATCH), mode="bicubic", antialias=True
    )
    states = llava.tower(small, output_hidden_states=True, interpolate_pos_encoding=True)
    close(got, llava.projector(states.hidden_states[-2][:, 1:]))


def test_features_that_do_not_fit_raise(llava: TowerAndProjector) -> None:
    sites = locate_vision(llava.tower)
    mask = torch.ones(2, N, dtype=torch.bool)
    with engine(sites, Behind(mask=mask), block=DEPTH - 2, projector=llava.projector):
        llava.tower(images())
        with pytest.raises(UnsupportedError, match="prefix"):
            llava.projector(torch.zeros(2, N + 1, WIDTH))


@pytest.mark.parametrize("name", ["timm-vit-avg", "hf-dinov2-classifier"])
def test_pooled_head_weighs_by_size(name: str) -> None:
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    run = partial(mini.run, model, pixels)
    with engine(sites, Fold()) as e:
        out = mini.run(model, pixels)
        e.refill = False
        x = last_block(sites, run)
    size = e.state.size
    if name.startswith("timm"):
        mean = (x * size[..., None]).sum(1) / N
        want = model.head(model.fc_norm(mean))
    else:
        x = model.dinov2.layernorm(x)
        mean = (x[:, 1:] * size[..., None]).sum(1) / N
        want = model.classifier(torch.cat([x[:, 0], mean], 1))
    close(out["logits"], want)
    assert (out["logits"] - mini.run(model, pixels)["logits"]).abs().max() > 1e-3
    with engine(sites, Fold(r=5), Drop()):  # something is gone: the survivors are what there is
        assert mini.run(model, pixels)["logits"].shape == want.shape
        assert last_block(sites, run).shape[1] < N


# ---- precision and torch.compile -----------------------------------------------------------------


@ALL
def test_half_precision_stays(name: str) -> None:
    mini = ENCODERS[name]
    model = mini().to(torch.bfloat16)
    sites = locate_vision(model)
    with engine(sites, Fold(r=5, proportional_attention=True), Drop()):
        out = mini.run(model, images().to(torch.bfloat16))
    assert all(v.dtype == torch.bfloat16 and v.isfinite().all() for v in out.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-vit", "hf-clip", "open-clip", "timm-eva"])
def test_fixed_budgets_compile_to_one_graph(name: str) -> None:
    mini = ENCODERS[name]
    model, pixels = mini(), images()
    sites = locate_vision(model)
    from vtc.methods.tome import ToMe

    mini.run(model, pixels)  # Hugging Face installs its recording hooks at the first call
    torch._dynamo.reset()
    with engine(sites, ToMe(keep_ratio=0.5), block=LAST) as e:
        want = model(pixels)
        counts = e.state.counts
        got = torch.compile(model, backend="eager", fullgraph=True)(pixels)
        assert e.state.counts == counts
    torch._dynamo.reset()

    def tokens(out: Any) -> Tensor:
        if isinstance(out, Tensor):
            return out
        return out[0] if isinstance(out, tuple) else out.last_hidden_state

    close(tokens(got), tokens(want))


def test_prefix_arithmetic() -> None:
    r = Reduction(torch.tensor([[0, 2, 4]]), torch.tensor([[0, -1, 1, 1, 2]]))
    inner = without_prefix(r, 1)
    assert inner.keep.tolist() == [[1, 3]] and inner.group.tolist() == [[-1, 0, 0, 1]]


assert SIZE == GRID * PATCH
