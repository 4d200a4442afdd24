# SPDX-License-Identifier: Apache-2.0
"""BLIP and BLIP-2: scores of images and texts from fewer image tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mini
import pytest
import torch
import transformers as hf
from mini import BLIP_VISION, DEPTH, ENCODERS, GRID, WIDTH, images
from snapshot import snapshot
from torch import Tensor, nn

import vtc
from vtc.adapters.locate import locate_vision
from vtc.benchmarks.shared.budgets import seeded
from vtc.method import Method
from vtc.methods.pitome import PiToMe
from vtc.reduction import Reduction

N = GRID * GRID
SCORING = pytest.mark.parametrize("name", ["hf-blip-retrieval", "hf-blip2-retrieval"])
CROSS = ("BlipTextSelfAttention", "Blip2QFormerMultiHeadAttention")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def masked(model: nn.Module, alive: Tensor, tokens: Tensor | None = None) -> Iterator[None]:
    """The stock model, its cross-attention blind for dead tokens (B, T) of the tower.

    Args:
        tokens: (B, T, C), read instead of the tower's.
    """
    hide = torch.zeros(alive.shape).masked_fill(~alive, torch.finfo(torch.float32).min)

    def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("encoder_hidden_states") is None:
            return None
        # Where scores are computed: BLIP's own layers (5.23) lose a mask on the way.
        name = "encoder_attention_mask"
        kwargs = {**kwargs, name: hide[:, None, None, :]}
        if tokens is not None:
            kwargs["encoder_hidden_states"] = tokens
        return args, kwargs

    cross = [m for m in model.modules() if type(m).__name__ in CROSS]
    assert cross
    handles = [m.register_forward_pre_hook(read, with_kwargs=True) for m in cross]
    yield
    for handle in handles:
        handle.remove()


def with_prefix(state: Any) -> Tensor:
    """(B, T) which tokens of the tower, [CLS] included, are left."""
    tokens = state.tokens
    alive = torch.zeros(tokens.group.shape, dtype=torch.bool)
    for r, keep in enumerate(tokens.keep):
        alive[r, keep if tokens.valid is None else keep[tokens.valid[r]]] = True
    return alive


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() == {"itm", "itc"}
    for key in want:
        torch.testing.assert_close(got[key], want[key], atol=1e-5, rtol=1e-5)


@dataclass(frozen=True, kw_only=True)
class Loud(Method):
    """Keep the patches that are at least as loud as the first of their image: ragged."""

    behind: bool = False
    vision_site = "output"
    name = "test-loud"

    @property
    def stages(self) -> frozenset:
        return frozenset({"features" if self.behind else "vision"})

    def on_vision_layer(self, v: Any) -> Reduction | None:
        norm = v.x.norm(dim=-1)
        keep = norm >= norm[:, v.prefix, None]
        keep[:, : v.prefix] = True
        return Reduction.from_mask(keep) if v.layer == DEPTH - 1 else None

    def on_features(self, v: Any) -> Reduction:
        norm = v.features.norm(dim=-1)
        return Reduction.from_mask(norm >= norm[:, :1])


RAGGED = {"ragged": Loud(behind=True), "ragged-inside": Loud()}


def chosen(method: str) -> Method:
    return RAGGED.get(method) or seeded(method, Fraction(3, 10), 0)


@SCORING
@pytest.mark.parametrize("method", ["random", "divprune", "fastervlm", "uniform"])
def test_a_dropped_token_is_a_masked_one(name: str, method: str) -> None:
    """Dropped behind the tower: the stock model with a mask on the image tokens."""
    model, pixels, run = ENCODERS[name](), images(), ENCODERS[name].run
    stock = run(model, pixels)
    with vtc.compressing(model, method, keep_tokens=11) as session:
        got = run(model, pixels)
        alive = with_prefix(session.vision.state)
    assert alive.sum(1).tolist() == [12, 12]
    with masked(model, alive):
        close(got, run(model, pixels))
    assert (got["itm"] - stock["itm"]).abs().max() > 1e-3


@SCORING
@pytest.mark.parametrize("method", ["zero-tprune", "pitome", *RAGGED])
def test_the_text_reads_what_left_the_tower(name: str, method: str) -> None:
    """Dropped or merged in the tower, ragged or not: only what is left is read."""
    model, pixels, run = ENCODERS[name](), images(seed=3), ENCODERS[name].run
    written: list[Tensor] = []
    vtc.wrap(model, chosen(method))
    tower: Any = locate_vision(model).tower
    handle = tower.register_forward_hook(lambda m, a, o: written.append(o[0]))
    got = run(model, pixels)
    handle.remove()
    state = model.vtc.vision.state
    valid = state.tokens.valid
    assert (valid is not None) == (method in RAGGED)
    vtc.unwrap(model)
    alive = with_prefix(state)
    tokens = 5 * torch.randn(2, N + 1, WIDTH)  # what is masked does not matter
    for r in range(2):
        rows = written[0][r] if valid is None else written[0][r][valid[r]]
        tokens[r, alive[r]] = rows
    with masked(model, alive, tokens):
        want = run(model, pixels)
        if name == "hf-blip-retrieval":  # ITC reads the class token of the tower itself
            feature = nn.functional.normalize(model.vision_proj(written[0][:, 0]), dim=-1)
            text = model.text_encoder(**mini.texts()).last_hidden_state[:, 0]
            want["itc"] = feature @ nn.functional.normalize(model.text_proj(text), dim=-1).t()
    close(got, want)


@SCORING
@pytest.mark.parametrize("method", RAGGED)
def test_images_that_keep_different_numbers_are_as_if_alone(name: str, method: str) -> None:
    model, pixels, run = ENCODERS[name](), images(seed=3), ENCODERS[name].run
    vtc.wrap(model, chosen(method))
    together = run(model, pixels)
    counts = model.vtc.vision.state.reduction.counts.tolist()
    assert counts[0] != counts[1]
    alone = run(model, pixels[:1])
    torch.testing.assert_close(together["itm"][:1], alone["itm"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together["itc"][:1, :1], alone["itc"], atol=1e-5, rtol=1e-5)


def test_image_tokens_of_another_call_are_refused_where_padding_is_unknown() -> None:
    model = ENCODERS["hf-blip-retrieval"]()
    vtc.wrap(model, Loud(behind=True))
    first = model.vision_model(images(seed=3)).last_hidden_state
    model.vision_model(images(seed=5))
    with pytest.raises(vtc.UnsupportedError, match="another encoder call"):
        model.text_encoder(**mini.texts(), encoder_hidden_states=first)


# ---- attention with a key bias -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf-blip", "hf-blip2", "hf-instructblip"])
def test_views_and_proportional_attention_are_the_models_own(name: str) -> None:
    """Probabilities as recorded by Hugging Face, with the log of the sizes in them."""
    from encoder_cases import Rows

    from vtc.engine.vision.engine import VisionEngine

    model = ENCODERS[name]()
    if name != "hf-blip":
        model.set_attn_implementation("eager")
    before = snapshot(model)
    for proportional in (True, False):
        seen: list[dict[str, Tensor]] = []
        tome = vtc.methods()["tome"](keep_ratio=0.4, proportional_attention=proportional)
        engine = VisionEngine(locate_vision(model), (Rows(seen=seen), tome), DEPTH - 1, None)
        engine.install()
        weights = model(images(), output_attentions=True).attentions
        engine.remove()
        for view, real in zip(seen, weights, strict=True):
            torch.testing.assert_close(view["attention"], real, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(view["cls"], real[:, :, 0], atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(view["mean"], view["key"].mean(1))
    assert weights[-1].shape[-1] < weights[0].shape[-1]
    assert {k: v[3] for k, v in snapshot(model).items()} == {k: v[3] for k, v in before.items()}


@pytest.mark.parametrize("name", ["hf-blip", "hf-blip2"])
def test_a_crashed_forward_leaves_no_bias(name: str) -> None:
    model, pixels = ENCODERS[name](), images()
    vtc.wrap(model, "tome", keep_ratio=0.5)
    want = model(pixels).last_hidden_state
    attn = model.encoder.layers[3].self_attn
    handle = attn.qkv.register_forward_hook(lambda m, a, o: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(pixels)
    handle.remove()
    assert torch.equal(model(pixels).last_hidden_state, want)
    vtc.unwrap(model)
    stock = ENCODERS[name]()(pixels).last_hidden_state
    assert torch.equal(model(pixels).last_hidden_state, stock)


def test_attention_without_masks_is_refused() -> None:
    model = ENCODERS["hf-blip2"]()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(vtc.UnsupportedError, match='attn_implementation="sdpa"'):
        vtc.wrap(model, "tome")


# ---- published settings, and models around the tower ---------------------------------------------


@pytest.mark.parametrize("backbone", ["blip", "blip2"])
def test_published_settings_of_pitome(backbone: str) -> None:
    """Every block but BLIP's last keeps 95 % of the tokens."""
    model = ENCODERS[f"hf-{backbone}-retrieval"]()
    method = PiToMe.preset(backbone, ratio=0.95)
    vtc.wrap(model, method)
    ENCODERS[f"hf-{backbone}-retrieval"].run(model, images())
    wanted = [N]
    for _ in range(DEPTH):
        wanted.append(wanted[-1] - int(wanted[-1] - wanted[-1] * 0.95))
    if backbone == "blip":
        wanted[-1] = wanted[-2]
    assert model.vtc.vision.state.counts == [n + 1 for n in wanted[1:]]
    assert model.vtc.report().final_tokens == wanted[-1]


def _captioner() -> nn.Module:
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(vocab_size=40, encoder_hidden_size=WIDTH, max_position_embeddings=32)
    text |= dict(bos_token_id=5, sep_token_id=39, pad_token_id=0, is_decoder=True)
    return hf.BlipForConditionalGeneration(
        hf.BlipConfig(text_config=text, vision_config=BLIP_VISION)
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_of_a_ragged_batch(beams: int) -> None:
    torch.manual_seed(0)
    model, pixels = mini.loud(_captioner()), images(seed=3)
    vtc.wrap(model, Loud(behind=True))
    how = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(pixel_values=pixels, **how)
    counts = model.vtc.vision.state.reduction.counts.tolist()
    assert counts[0] != counts[1]
    short = counts.index(min(counts))
    alone = model.generate(pixel_values=pixels[short : short + 1], **how)
    assert torch.equal(together.sequences[short], alone.sequences[0])
    if beams == 1:
        got, want = (torch.stack(o.logits, 1) for o in (together, alone))
        torch.testing.assert_close(got[short], want[0], atol=1e-5, rtol=1e-5)


def _blip2_model() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    text = hf.OPTConfig(
        vocab_size=40,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    base = mini.blip2_retrieval().config
    config = hf.Blip2Config(
        vision_config=base.vision_config,
        qformer_config=base.qformer_config,
        text_config=text,
        num_query_tokens=3,
        image_token_index=39,
    )
    ids = torch.tensor([[39, 39, 39, 5, 6]] * 2)

    def run(model: nn.Module) -> Tensor:
        return model(pixel_values=images(), input_ids=ids).logits

    return hf.Blip2Model(config), run


def test_blip2_model_takes_shorter_images() -> None:
    torch.manual_seed(0)
    made, run = _blip2_model()
    model = mini.loud(made)
    stock, before = run(model), snapshot(model)
    with vtc.compressing(model, "divprune", keep_tokens=9) as session:
        got = run(model)
        alive = with_prefix(session.vision.state)
    with masked(model, alive):
        torch.testing.assert_close(got, run(model), atol=1e-5, rtol=1e-5)
    assert (got - stock).abs().max() > 1e-3
    assert snapshot(model) == before and torch.equal(run(model), stock)
    with pytest.raises(
        vtc.UnsupportedError, match=r"by cross-attention, .*that work here: .*divprune"
    ):
        vtc.wrap(model, "fastv")
