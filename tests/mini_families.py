# SPDX-License-Identifier: Apache-2.0
"""Mini random models of the families whose LLM tokens are joined patches, and PaliGemma.

A family is one entry of `FAMILIES`: a model of width 32 to 48 and what makes prompts for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from mini_llava import DECODERS, IMAGE, PAD, TOWERS, padded
from torch import Tensor

BREAK, END = 50, 51
TILE_NAMES = (52, 53)


@dataclass(frozen=True)
class Family:
    """How to make a mini model and prompts.

    Attributes:
        config: attention implementation -> configuration.
        cls: name of the class.
        images: makes the vision inputs of all rows from a generator and, for each row, image sizes
            in units of the family.
        tokens: of an image of such a size, the prompt's ids, placeholders among them.
        sizes: image sizes that differ, where the family takes such; methods' budget units of one.
        count: (rows, columns) of LLM tokens of each budget unit of an image of such a size.
        joins: whether no token may leave inside the encoder; has_cls: whether that has a [CLS].
        extra: further inputs from ids and mask.
    """

    cls: str
    config: Callable[[], Any]
    images: Callable[[torch.Generator, list[list[Any]]], dict[str, Tensor]]
    tokens: Callable[[Any], list[int]]
    count: Callable[[Any], list[tuple[int, int]]]
    sizes: tuple[Any, Any, Any]
    joins: bool = True
    has_cls: bool = False
    extra: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda ids, mask: {}


def _tiles(edge: int) -> Callable[[torch.Generator, list[list[int]]], dict[str, Tensor]]:
    """Images of a number of tiles each, all tiles in one batch."""

    def make(g: torch.Generator, rows: list[list[int]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(sum(map(sum, rows)), 3, edge, edge, generator=g)}

    return make


def _by_sample(g: torch.Generator, rows: list[list[int]]) -> dict[str, Tensor]:
    """Idefics3: (samples, most tiles, ...), zeros where a sample has fewer; one padded tile."""
    edge = 64
    most = max(map(sum, rows))
    pixels = torch.zeros(len(rows), most, 3, edge, edge)
    mask = torch.zeros(len(rows), most, edge, edge, dtype=torch.bool)
    for r, row in enumerate(rows):
        pixels[r, : sum(row)] = torch.randn(sum(row), 3, edge, edge, generator=g)
        mask[r, : sum(row)] = True
    pixels[0, 0, :, 40:], mask[0, 0, 40:] = 0, False
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _sized(g: torch.Generator, rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """Images of any (height, width), padded to the largest."""
    sizes = [size for row in rows for size in row]
    height, width = (max(edges) for edges in zip(*sizes, strict=True))
    pixels = torch.zeros(len(sizes), 3, height, width)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=g)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _lines(unit: int) -> Callable[[tuple[int, int]], list[int]]:
    """Pixtral's prompt: every row of tokens ends in a token of text."""

    def tokens(size: tuple[int, int]) -> list[int]:
        line = [IMAGE] * (size[1] // unit) + [BREAK]
        return (line * (size[0] // unit))[:-1] + [END]

    return tokens


def _one(rows: int, columns: int) -> Callable[[Any], list[tuple[int, int]]]:
    return lambda tiles: [(rows, columns)] * tiles


def _named_tiles(tiles: int) -> list[int]:
    """Idefics3's prompt: a name in front of each tile."""
    return [t for i in range(tiles) for t in (BREAK, TILE_NAMES[i % 2], *[IMAGE] * 16)] + [BREAK]


def _text(name: str, **more: Any) -> Any:
    shape = DECODERS["llama"]().to_dict()
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "vocab_size max_position_embeddings pad_token_id bos_token_id eos_token_id"
    )
    return getattr(transformers, name + "Config")(**{k: shape[k] for k in names.split()}, **more)


def _internvl() -> Any:
    vision = transformers.InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        use_qk_norm=True,
        norm_type="rms_norm",
        layer_scale_init_value=1.0,
    )
    return transformers.InternVLConfig(
        vision_config=vision,
        text_config=_text("Qwen2"),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _idefics(prefix: str) -> Any:
    vision = getattr(transformers, prefix + "VisionConfig")(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
    )
    return getattr(transformers, prefix + "Config")(
        vision_config=vision,
        text_config=_text("Llama"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )


def _paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        vision_config=TOWERS["siglip"](),
        text_config=_text("Gemma", head_dim=12),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        projection_dim=48,
        hidden_size=48,
        vocab_size=60,
    )


def _gemma3(window: int) -> Any:
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        vision_use_head=False,
    )
    kinds = ["full_attention"] * 5
    if window:
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    text = _text(
        "Gemma3Text",
        head_dim=12,
        layer_types=kinds[:5],
        sliding_window=window or 4096,
        query_pre_attn_scalar=12,
    )
    return transformers.Gemma3Config(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        mm_tokens_per_image=16,
    )


def _pixtral() -> Any:
    return transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=128,
        patch_size=8,
    )


def _mistral3() -> Any:
    return transformers.Mistral3Config(
        vision_config=_pixtral(),
        text_config=_text("Mistral", sliding_window=None, head_dim=12),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )


def _llava_pixtral() -> Any:
    return transformers.LlavaConfig(
        vision_config=_pixtral(),
        text_config=_text("Mistral", sliding_window=None, head_dim=12),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Gemma: which tokens are the image."""
    return {"token_type_ids": (ids == IMAGE).long()}


def _prefix(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """PaliGemma: the whole prompt is prefix."""
    return {"token_type_ids": torch.zeros_like(ids)}


def _plain(tiles: int) -> list[int]:
    return [IMAGE] * 16 * tiles


_sixteen = dict(tokens=_plain, count=_one(4, 4), sizes=(2, 1, 2))
_gemma: dict[str, Any] = dict(
    cls="Gemma3ForConditionalGeneration", images=_tiles(64), extra=_types, **_sixteen
)
_gemma |= {"tokens": lambda n: ([BREAK] + [IMAGE] * 16 + [END]) * n}
_named: dict[str, Any] = dict(
    images=_by_sample, tokens=_named_tiles, count=_one(4, 4), sizes=(2, 1, 2)
)

FAMILIES: dict[str, Family] = {
    "internvl": Family(
        "InternVLForConditionalGeneration", _internvl, _tiles(64), has_cls=True, **_sixteen
    ),
    "idefics3": Family("Idefics3ForConditionalGeneration", lambda: _idefics("Idefics3"), **_named),
    "smolvlm": Family("SmolVLMForConditionalGeneration", lambda: _idefics("SmolVLM"), **_named),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        _paligemma,
        _tiles(32),
        joins=False,
        extra=_prefix,
        **_sixteen,
    ),
    "gemma3": Family(config=lambda: _gemma3(20), **_gemma),
    "gemma3-full": Family(config=lambda: _gemma3(0), **_gemma),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        _mistral3,
        _sized,
        _lines(16),
        count=lambda size: [(size[0] // 16, size[1] // 16)],
        sizes=((64, 48), (32, 80), (80, 80)),
    ),
    "llava-pixtral": Family(
        "LlavaForConditionalGeneration",
        _llava_pixtral,
        _sized,
        _lines(8),
        count=lambda size: [(size[0] // 8, size[1] // 8)],
        sizes=((32, 24), (16, 40), (40, 40)),
    ),
}


def build(family: str, attention: str = "sdpa", seed: int = 0, gain: float = 4.0) -> Any:
    """A random model whose attention is far from uniform, in eval mode."""
    torch.manual_seed(seed)
    made = FAMILIES[family]
    config = made.config()
    config._attn_implementation = attention
    model = getattr(transformers, made.cls)(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(gain)
            if "mm_input_projection_weight" in name:  # zeros
                weight.normal_(std=0.3)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(
    family: str,
    rows: list[list[Any]],
    pad: str | None = None,
    seed: int = 0,
    before: int = 3,
    after: int = 5,
    between: int = 2,
) -> dict[str, Tensor]:
    """Rows of "text image text image text", one list of image sizes for each row."""
    made, g = FAMILIES[family], torch.Generator().manual_seed(seed)

    def words(k: int) -> list[int]:
        return torch.randint(5, 50, (k,), generator=g).tolist()

    ids = []
    for r, row in enumerate(rows):
        line = words(before + (r if pad else 0))
        for i, size in enumerate(row):
            line += (words(between) if i else []) + made.tokens(size)
        ids.append(line + words(after))
    inputs = padded(ids, pad)
    more = made.extra(inputs["input_ids"], inputs["attention_mask"])
    return {**inputs, **more, **made.images(g, rows)}


def row_of(family: str, inputs: dict[str, Tensor], rows: list[list[Any]], r: int) -> dict:
    """One row of a batch without padding and mates."""
    real = inputs["attention_mask"][r].bool()
    first = sum(len(FAMILIES[family].count(s)) for row in rows[:r] for s in row)
    mine = slice(first, first + sum(len(FAMILIES[family].count(s)) for s in rows[r]))
    out = {}
    for name, x in inputs.items():
        if x.shape == inputs["input_ids"].shape:
            out[name] = x[r : r + 1, real]
        elif (
            name in ("pixel_values", "pixel_attention_mask")
            and len(x) == len(rows)
            and (FAMILIES[family].images is _by_sample)
        ):
            out[name] = x[r : r + 1, : mine.stop - mine.start]
        else:
            out[name] = x[mine]
    return out
