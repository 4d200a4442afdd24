# SPDX-License-Identifier: Apache-2.0
"""Seldom callers, masks, models and caches: branches that no other test takes."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from types import SimpleNamespace
from typing import Any, ClassVar

import mini_llava
import mini_video
import pytest
import torch
from snapshot import snapshot
from torch import Tensor, nn
from transformers import DynamicCache

import vtc
from vtc.cache import pruned as kv
from vtc.engine import refusals
from vtc.engine.llm.layer_arguments import Arguments, _gather_mask
from vtc.engine.vision.cross_attention_mask import _both
from vtc.hooks import attention_rows
from vtc.method import Scorer
from vtc.methods.mod import Depths
from vtc.reduction import Reduction
from vtc.transformers_contract import giving

ENCODED_BEFORE = "mm_encoder_outputs" in signature(mini_llava.build().forward).parameters


# ---- masks, as each attention hands them over ----------------------------------------------------


def attended(mask: Tensor | None, columns: Tensor, rows: Tensor) -> Tensor:
    """(B, q, kv) bool, what a mask of any kind lets queries see of keys in causal order."""
    seen = columns[:, None, :] <= rows[:, :, None]
    if mask is None:
        return seen
    if mask.dim() == 2:
        return seen & mask[:, None, :].bool()
    return (mask if mask.dtype == torch.bool else mask == 0)[:, 0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("filled", [False, True])
def test_every_kind_of_mask_hides_the_same(padded: bool, filled: bool) -> None:
    """FlashAttention's (B, kv), bool and additive (B, 1, q, kv), and none."""
    logical, kept = 9, torch.tensor([[0, 2, 3, 7, 8], [1, 2, 4, 6, 8]])
    real = torch.ones(2, logical, dtype=torch.bool)
    if padded:
        real[1, :2] = False
    filler = torch.zeros_like(kept, dtype=torch.bool)
    if filled:
        filler[0, 1] = filler[1, 3] = True
    square = torch.ones(logical, logical, dtype=torch.bool).tril() & real[:, None, :]
    additive = torch.zeros(2, 1, logical, logical).masked_fill(~square[:, None], -1e9)
    want = (kept[:, None, :] <= kept[:, :, None]) & real.gather(1, kept)[:, None, :]
    want = want & ~filler[:, None, :]
    kinds = [(real, True), (square[:, None], False), (additive, False)]
    for mask, flash in kinds + ([] if padded else [(None, False), (None, True)]):
        given = filler if filled else None
        got = _gather_mask(mask, kept, True, 0, kept, given, flash)
        got = got if got is None or got.dtype == torch.bool else (got > -1e8)
        assert torch.equal(attended(got, kept, kept), want), (mask, flash)


def test_flash_attention_gets_no_positions_and_a_flat_mask() -> None:
    """It would read gaps in positions as the ends of sequences that share a row."""
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    decoder = nn.Module()
    decoder.config = config  # type: ignore[assignment]
    layer = SimpleNamespace(
        physical_length=lambda: 3,
        get_seq_length=lambda: 5,
        columns=lambda device: torch.tensor([[0, 2, 4]]),
        filler=None,
        kept=torch.tensor([[0, 2, 4]]),
        dropped=2,
        shift=None,
    )
    real = torch.tensor([[0, 1, 1, 1, 1, 1]])
    kwargs = {"attention_mask": real, "position_ids": torch.tensor([[5]])}
    got = Arguments(decoder, False).gathered(0, None, torch.zeros(1, 1, 8), layer, kwargs)
    assert got["position_ids"] is None
    assert got["attention_mask"].tolist() == [[0, 1, 1, 1]]
    assert kwargs["position_ids"] is not None, "the caller's own must stay"


def test_masks_of_other_kinds_are_refused() -> None:
    columns = torch.arange(3)[None]
    with pytest.raises(vtc.UnsupportedError, match="masks of type SimpleNamespace"):
        _gather_mask(SimpleNamespace(), columns, False, 0, columns, None, False)


def test_attention_under_a_flat_mask_is_that_under_a_square_one() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 3, 8, generator=g), torch.randn(2, 2, 7, 8, generator=g)
    rows = torch.tensor([[2, 4, 6], [1, 5, 6]])
    flat = torch.ones(2, 7, dtype=torch.bool)
    flat[1, :2] = flat[0, 3] = False
    flat[1, 1] = True  # no query without a key
    square = (torch.ones(7, 7, dtype=torch.bool).tril() & flat[:, None, :])[:, None]
    want = attention_rows.attend(query, key, square, rows, 7, 0.5)
    torch.testing.assert_close(attention_rows.attend(query, key, flat, rows, 7, 0.5), want)


def test_padding_of_images_joins_any_mask_of_a_reader() -> None:
    """The text side of BLIP: its own mask, of each kind, and the padding of ragged images."""
    low = torch.finfo(torch.float32).min
    own, valid = torch.tensor([[1, 1, 0, 1]]), torch.tensor([[True, False, True, True]])
    hide = torch.zeros(1, 4).masked_fill(~valid, low)[:, None, None, :]
    want = [True, False, False, True]
    square = own.bool()[:, None, None, :].expand(1, 1, 2, 4)
    kinds: list[Tensor] = [
        own,
        own.bool(),
        square,
        torch.zeros(1, 1, 2, 4).masked_fill(~square, low),
    ]
    for mask in kinds:
        got = _both(mask, hide)
        seen = got if got.dtype == torch.bool else got == 0
        assert seen.dim() == 4 and seen.expand(1, 1, 2, 4).unique(dim=2)[0, 0, 0].tolist() == want
    assert _both(None, hide) is hide


# ---- models and chains that are refused ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BypassByNorm(Depths):
    """Lets the tokens of largest norm into layer 1."""

    name: ClassVar[str] = "test-bypass"

    def bypass_layers(self, depth: int) -> tuple[int, ...]:
        return (1,)

    def score(self, v: Any) -> Tensor:
        return v.tokens.norm(dim=-1)


def sites(**config: Any) -> Any:
    known = {"_attn_implementation": "sdpa", "sliding_window": None, **config}
    return SimpleNamespace(mrope=False, decoder=SimpleNamespace(config=SimpleNamespace(**known)))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"layer_types": ["chunked_attention", "full_attention"]}, "attends in chunks"),
        ({"_attn_implementation": "flex_attention"}, '"flex_attention" builds masks'),
        ({"_attn_implementation": "paged|sdpa"}, "cannot be gathered"),
    ],
)
def test_attention_that_cannot_be_gathered(config: dict[str, Any], why: str) -> None:
    refusals.check_language_model(sites(), False)
    with pytest.raises(vtc.UnsupportedError, match=why):
        refusals.check_language_model(sites(**config), False)


def test_two_with_a_bypass() -> None:
    both = vtc.chain(BypassByNorm(), vtc.methods()["mod-heuristic"]())
    with pytest.raises(vtc.UnsupportedError, match=r"test-bypass and mod.* both let tokens jump"):
        vtc.wrap(mini_llava.build(), both)


def test_methods_that_look_ahead_need_the_parts_of_a_llama_layer() -> None:
    model = mini_llava.build()
    for layer in model.model.language_model.layers:
        del layer.self_attn.head_dim
    with pytest.raises(vtc.UnsupportedError, match=r"does not have the parts of a Llama layer"):
        vtc.wrap(model, "pyramiddrop")
    assert "vtc" not in model.__dict__


@pytest.mark.parametrize("layers", [(), (-1,), (1.5,)])
def test_layers_to_bypass_are_counts(layers: Any) -> None:
    with pytest.raises(ValueError, match="0-based LLM layers"):
        vtc.methods()["mod-heuristic"](layers=layers)


def test_layers_to_bypass_must_exist() -> None:
    with pytest.raises(vtc.UnsupportedError, match="acts in LLM layer 9 and there are 5"):
        vtc.wrap(mini_llava.build(), vtc.methods()["mod-heuristic"](layers=(9,)))


def test_a_failed_wrap_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mini_llava.build()
    before = snapshot(model)
    monkeypatch.setattr(attention_rows, "install", lambda attentions: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vtc.wrap(model, "fastv")
    assert snapshot(model) == before and "vtc" not in model.__dict__


# ---- methods without their one function ----------------------------------------------------------


@pytest.mark.parametrize("base", [Scorer, Depths])
@torch.no_grad()
def test_a_method_that_ranks_must_score(base: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Scoreless(base):
        name: ClassVar[str] = "test-scoreless"

    with (
        vtc.compressing(mini_llava.build(), Scoreless(keep_ratio=0.5)) as session,
        pytest.raises(NotImplementedError, match=r"Scoreless must define score\(view\)"),
    ):
        session.model(**mini_llava.prompt(1, batch=1))


def test_what_else_a_method_must_define_is_said() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nowhere(Scorer):
        name: ClassVar[str] = "test-nowhere"
        stage = "decoder"

    with pytest.raises(NotImplementedError, match="Nowhere must define after_layer"):
        vtc.wrap(mini_llava.build(), Nowhere(keep_ratio=0.5))

    @dataclass(frozen=True, kw_only=True)
    class Nameless(vtc.Method):
        pass

    with pytest.raises(ValueError, match="Nameless needs a name"):
        vtc.register(Nameless)


@torch.no_grad()
def test_the_row_of_a_missing_class_token_is_refused() -> None:
    """By the views themselves, for methods that do not say what they need."""
    asked: list[str] = []

    @dataclass(frozen=True, kw_only=True)
    class Careless(vtc.Method):
        name: ClassVar[str] = "test-careless"

        def captures(self, depth: int) -> tuple[int, ...]:
            return (0,)

        def on_vision_layer(self, v: Any) -> Reduction | None:
            with pytest.raises(vtc.UnsupportedError, match=r"no \[CLS\] token"):
                v.cls_attention  # noqa: B018
            asked.append("block")
            return None

        def on_features(self, v: Any) -> Reduction | None:
            for row in ("cls_attention", "cls_logits", "cls_similarity"):
                with pytest.raises(vtc.UnsupportedError, match=r"no \[CLS\] token"):
                    getattr(v, row)(0)
                asked.append(row)
            return None

    vtc.wrap(mini_llava.build("siglip"), Careless())(**mini_llava.prompt(1, batch=1))
    assert {"block", "cls_attention", "cls_logits", "cls_similarity"} <= set(asked)


# ---- parts of a model, called on their own
# --------------------------------------------------------


@pytest.mark.parametrize("method", ["pitome", "zero-tprune", "visionzip", "mustdrop"])
@torch.no_grad()
def test_parts_called_on_their_own_are_stock(method: str) -> None:
    """Before the first image and after it: what the last forward did must not be done to them."""
    model, inputs = mini_llava.build(), mini_llava.prompt(1)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    blocks = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))
    x = torch.randn(2, 17, tower.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def parts() -> list[Tensor]:
        return [*(block(x, None) for block in blocks), projector(x[:, 1:]), projector(x[:, 9:])]

    stock = parts()
    with vtc.compressing(model, method, keep_ratio=0.5):
        assert all(map(torch.equal, parts(), stock))
        want = model(**inputs).logits
        assert all(map(torch.equal, parts(), stock))
        assert torch.equal(model(**inputs).logits, want)


@torch.no_grad()
def test_an_encoder_called_without_an_image() -> None:
    model = vtc.wrap(mini_llava.build(), "pitome", keep_ratio=0.5)
    want = model(**mini_llava.prompt(1)).logits
    with pytest.raises((AttributeError, ValueError)):
        model.model.vision_tower(pixel_values=None)
    assert torch.equal(model(**mini_llava.prompt(1)).logits, want)


@torch.no_grad()
def test_answers_as_tuples() -> None:
    model, inputs = vtc.wrap(mini_llava.build(), "fastv", keep_ratio=0.5), mini_llava.prompt(1)
    want = model(**inputs, use_cache=False).logits
    language_model = model.model.language_model
    given: list[Any] = []
    handle = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "return_dict": False}), with_kwargs=True
    )
    other = language_model.register_forward_hook(lambda module, args, output: given.append(output))
    with pytest.raises((AttributeError, TypeError)):  # the model itself needs names
        model(**inputs, use_cache=False)
    handle.remove()
    other.remove()
    assert isinstance(given[0], tuple)
    torch.testing.assert_close(model.lm_head(given[0][0]), want)


@torch.no_grad()
def test_attention_with_positional_hidden_states() -> None:
    """Of the tokens that enter it, in whichever way a decoder layer hands them over."""
    model, inputs = vtc.wrap(mini_llava.build(), "zipvl", keep_ratio=0.5), mini_llava.prompt(1)
    engine, stock, seen = model.vtc.decoder, type(model.vtc.decoder)._attn_pre, []

    def both(module: Any, args: Any, kwargs: Any) -> None:
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        named = stock(engine, module, args, kwargs)
        placed = stock(engine, module, (kwargs["hidden_states"],), rest)
        if named is not None:
            assert torch.equal(placed[0][0], named[1]["hidden_states"])
            seen.append(placed[0][0].shape[1])
        else:
            assert placed is None

    want = model(**inputs).logits
    for layer in engine.layers:
        layer.self_attn.register_forward_pre_hook(both, with_kwargs=True, prepend=True)
    assert torch.equal(model(**inputs).logits, want)
    assert seen and min(seen) < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("scope", ["visual", "all"])
@torch.no_grad()
def test_a_conversation_without_images_beside_a_cache_method(scope: str) -> None:
    model, text = mini_llava.build(), {"input_ids": torch.randint(4, 60, (2, 7))}
    how = {"max_new_tokens": 6, "do_sample": False}
    stock = model.generate(**text, **how)
    for method in (
        vtc.methods()["prefixkv"](scope=scope, keep_ratio=0.5),
        vtc.methods()["vidkv"](),
    ):
        with vtc.compressing(model, method):
            assert torch.equal(model.generate(**text, **how), stock)


def test_wrap_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that compiled nothing has no graph to forget."""
    import sys

    model = mini_llava.build()
    monkeypatch.setattr(torch.compiler, "reset", lambda: 1 / 0)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    vtc.unwrap(vtc.wrap(model, "fastv"))


# ---- compressed inputs ---------------------------------------------------------------------------


@pytest.mark.skipif(not ENCODED_BEFORE, reason="this transformers takes no encoded images")
@torch.no_grad()
def test_compressed_inputs_that_a_model_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = mini_llava.build(), mini_llava.prompt(1)
    monkeypatch.setattr(model, "forward", lambda pixel_values=None, input_ids=None: None)
    with pytest.raises(vtc.UnsupportedError, match=r"5\.18 and newer"):
        vtc.compress_inputs(model, inputs, "divprune", keep_ratio=0.5)
    qwen = mini_video.build("qwen2")
    inputs = mini_video.prompt([[(3, 4)]], "qwen2")
    del inputs["mm_token_type_ids"]
    with pytest.raises(ValueError, match="needs mm_token_type_ids, as its processor gives it"):
        vtc.compress_inputs(qwen, inputs, "divprune", keep_ratio=0.5)


# ---- features that were encoded elsewhere --------------------------------------------------------


@pytest.mark.skipif(not ENCODED_BEFORE, reason="this transformers takes no encoded images")
@torch.no_grad()
def test_notes_on_features_that_the_stock_model_made() -> None:
    """MustDrop would protect no key token, and answer all the same."""
    model, inputs = mini_llava.build(), mini_llava.prompt(1, batch=2)
    pixels = inputs.pop("pixel_values")
    encoded = {"image": model.get_image_features(pixels)}
    for own in ({}, {"merge_threshold": None}):
        with (
            vtc.compressing(model, "mustdrop", keep_ratio=0.5, **own),
            pytest.raises(vtc.UnsupportedError, match="were not made by the wrapped model"),
        ):
            model(**inputs, mm_encoder_outputs=encoded)
    own = {"merge_threshold": None, "key_ratio": 0}
    with vtc.compressing(model, "mustdrop", keep_ratio=0.5, **own):  # it takes no notes
        got = model(**inputs, mm_encoder_outputs=encoded).logits
        assert torch.equal(got, model(**inputs, pixel_values=pixels).logits)


@pytest.mark.skipif(not ENCODED_BEFORE, reason="this transformers takes no encoded images")
@pytest.mark.parametrize("family", ["onevision", "qwen2"])
@torch.no_grad()
def test_notes_on_a_video_beside_an_image_that_the_stock_model_made(family: str) -> None:
    model = mini_video.build(family)
    image = (3, 4) if mini_video.qwen(family) else (40, 60)
    inputs = mini_video.prompt([[mini_video.SHORT, image]], family)
    pictures, clips = inputs.pop("pixel_values"), inputs.pop("pixel_values_videos")
    sizes = {k: inputs[k] for k in ("image_grid_thw", "image_sizes") if k in inputs}
    frames = {k: inputs[k] for k in ("video_grid_thw",) if k in inputs}
    stock = model.get_image_features(pictures, **sizes)
    own = {"merge_threshold": None, "saliency": "cosine"}
    with vtc.compressing(model, "mustdrop", keep_ratio=0.5, **own):
        video = model.get_video_features(clips, **frames)
        with pytest.raises(vtc.UnsupportedError, match="were not made by the wrapped model"):
            model(**inputs, mm_encoder_outputs={"image": stock, "video": video})
        again = model.get_image_features(pictures, **sizes)
        video = model.get_video_features(clips, **frames)
        model(**inputs, mm_encoder_outputs={"image": again, "video": video})


# ---- caches --------------------------------------------------------------------------------------


def test_caches_of_other_kinds_are_refused() -> None:
    kv.check_cache(None, True)
    with pytest.raises(vtc.UnsupportedError, match="SimpleNamespace cannot be compressed"):
        kv.check_cache(SimpleNamespace(), False)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["fastv", "vidkv"])
@torch.no_grad()
def test_crop_to_a_length(method: str) -> None:
    """As transformers did before 5.13: a positive number is the length to keep."""
    model, inputs = mini_llava.build(), mini_llava.prompt(1, batch=1)
    stock, cache = DynamicCache(), DynamicCache()
    with vtc.compressing(model, method, **({"keep_ratio": 0.5} if method == "fastv" else {})):
        want = model(**inputs, **giving(model, stock), use_cache=True).logits
        length = want.shape[1]
        model(**inputs, **giving(model, cache), use_cache=True)
        word = {"input_ids": torch.tensor([[7]])}
        first = model(**word, **giving(model, cache)).logits
        for layer in cache.layers:  # stock ones of this release refuse it
            layer.crop(length if isinstance(layer, kv.PrunedMixin) else -1)
        assert any(isinstance(layer, kv.PrunedMixin) for layer in cache.layers)
        assert cache.get_seq_length() == length
        assert torch.equal(model(**word, **giving(model, cache)).logits, first)


@torch.no_grad()
def test_compact_positions_while_a_cache_method_decodes_padded_rows() -> None:
    """Layers in front of the one where tokens leave have no gap to close."""
    chain = vtc.chain(
        vtc.methods()["fastv"](keep_ratio=0.5, positions="compact"),
        vtc.methods()["prefixkv"](keep_ratio=0.5, positions="compact"),
    )
    model = vtc.wrap(mini_llava.build(), chain)
    both = mini_llava.prompt(1, batch=2, pad="left")
    generate = {"max_new_tokens": 4, "do_sample": False}
    together = model.generate(**both, **generate)[:, -4:]
    for r in range(2):
        real = both["attention_mask"][r].bool()
        alone = {"input_ids": both["input_ids"][r][real][None]}
        alone |= {"pixel_values": both["pixel_values"][r : r + 1]}
        assert torch.equal(model.generate(**alone, **generate)[0, -4:], together[r])


# ---- small things --------------------------------------------------------------------------------


def test_calibrating_prefixkv_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        vtc.methods()["prefixkv"].calibrate(mini_llava.build(), [])


def test_routers_are_themselves_alone() -> None:
    """A method that holds some can be compared and hashed, without reading tensors."""
    weights = {1: torch.ones(48)}
    mod = vtc.methods()["mod"]
    one, two = mod(routers=weights), mod(routers=weights)
    assert one == one and hash(one) == hash(one) and one != two


def test_stages_of_a_schedule_are_the_only_layers_it_acts_in() -> None:
    method = vtc.methods()["pyramiddrop"](keep_ratio=0.5)
    between = next(i for i in range(8) if i not in method.stage_layers(8))
    assert method.target(SimpleNamespace(layer=between, depth=8)) is None


def test_attention_without_a_head_size_has_no_partners() -> None:
    assert attention_rows.partners(nn.Linear(1, 1)) is None
