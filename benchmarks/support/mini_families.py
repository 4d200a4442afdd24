# SPDX-License-Identifier: Apache-2.0
"""Mini random models of every family with a language model, and prompts for them.

A family is one entry of `FAMILIES`. The tests run the invariants on all of these, and the support
matrix of docs/models.md has a column for each (tests/families/test_families.py,
benchmarks/support/calling_styles.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, PAD = 3, 4, 0
BREAK, END = 50, 51
TILE_NAMES = (52, 53)

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
JOINED: dict[str, Any] = VISION | {"num_hidden_layers": 3, "image_size": 64}
"""Of towers whose patches are joined 2 x 2."""
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS: dict[str, Any] = {"image_token_index": IMAGE, "image_token_id": IMAGE}


def tower(kind: str, **more: Any) -> Any:
    """Configuration of a tower of 4 x 4 patches: "clip", "siglip", "dinov2" or "vit"."""
    names = {"clip": "CLIPVision", "siglip": "SiglipVision", "dinov2": "Dinov2", "vit": "ViT"}
    shape = VISION | more
    if kind == "dinov2":
        del shape["intermediate_size"]
        shape["mlp_ratio"] = 2
    if kind == "siglip":
        shape.setdefault("vision_use_head", False)
    return getattr(transformers, names[kind] + "Config")(**shape)


def decoder(name: str, **more: Any) -> Any:
    """Configuration of a text model: the prefix of its class."""
    return getattr(transformers, name + "Config")(**(TEXT | more))


def llava(vision: Any, text: Any, **more: Any) -> Any:
    """Configuration of a LLaVA."""
    has_cls = vision.model_type != "siglip_vision_model"
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if has_cls else "full",
        **IDS,
        **more,
    )


def random_model(cls: str, config: Any, seed: int = 0, gain: float = 1.0) -> Any:
    """A model of random weights, matrices times a gain, in eval mode."""
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(gain)
            if "mm_input_projection_weight" in name:  # zeros
                weight.normal_(std=0.3)
    return model.eval()


def padded(rows: list[list[int]], pad: str | None) -> dict[str, Tensor]:
    """Token ids of different lengths as one batch, padded on the "right" or else on the left."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for r, row in enumerate(rows):
        at = slice(0, len(row)) if pad == "right" else slice(length - len(row), length)
        ids[r, at] = torch.tensor(row)
        mask[r, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


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


def _llava(kind: str) -> Any:
    return llava(tower(kind), decoder("Llama"))


def _crops(prefix: str) -> Any:
    """Images of two crops side by side and a thumbnail; narrower ones are padded."""
    following = prefix != "LlavaOnevision"
    more: dict[str, Any] = {} if prefix == "LlavaNext" else {"video_token_index": VIDEO}
    more |= {} if following else {"vision_aspect_ratio": "anyres_max_9"}
    return getattr(transformers, prefix + "Config")(
        vision_config=tower("clip" if following else "siglip"),
        text_config=decoder("Llama" if following else "Qwen2"),
        vision_feature_layer=-2 if following else -1,
        vision_feature_select_strategy="default" if following else "full",
        image_grid_pinpoints=[[32, 64]],
        **more,
        **IDS,
    )


def _cropped(g: torch.Generator, rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    sizes = [size for row in rows for size in row]
    pixels = torch.randn(len(sizes), 3, 3, 32, 32, generator=g)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _qwen(prefix: str) -> Any:
    vision: dict[str, Any] = {"depth": 4, "num_heads": 2, "patch_size": 4, "hidden_size": 32}
    if prefix == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    else:
        vision |= {"out_hidden_size": 48, "intermediate_size": 48}
    if prefix == "Qwen2_5_VL":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1, 3]}
    if prefix == "Qwen3VL":
        vision |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = TEXT | ({"head_dim": 12} if prefix == "Qwen3VL" else {})
    return getattr(transformers, prefix + "Config")(
        vision_config=vision,
        text_config=text | {"rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BREAK,
        vision_end_token_id=END,
    )


def _grids(g: torch.Generator, rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """Qwen: the patches of all images behind one another; sizes are those in LLM tokens."""
    grids = torch.tensor([[1, 2 * h, 2 * w] for row in rows for h, w in row])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4**2, generator=g)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def _internvl() -> Any:
    vision = transformers.InternVLVisionConfig(
        **JOINED, use_qk_norm=True, norm_type="rms_norm", layer_scale_init_value=1.0
    )
    return transformers.InternVLConfig(
        vision_config=vision,
        text_config=decoder("Qwen2"),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _idefics(prefix: str) -> Any:
    return getattr(transformers, prefix + "Config")(
        vision_config=getattr(transformers, prefix + "VisionConfig")(**JOINED),
        text_config=decoder("Llama"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )


def _paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        vision_config=tower("siglip"),
        text_config=decoder("Gemma", head_dim=12),
        projection_dim=48,
        hidden_size=48,
        vocab_size=60,
        **IDS,
    )


def _gemma3(window: int) -> Any:
    depth, kinds = TEXT["num_hidden_layers"], ["full_attention"] * 6
    if window:
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    text = decoder(
        "Gemma3Text",
        head_dim=12,
        layer_types=kinds[:depth],
        sliding_window=window or 4096,
        query_pre_attn_scalar=12,
    )
    return transformers.Gemma3Config(
        vision_config=tower("siglip", **JOINED), text_config=text, mm_tokens_per_image=16, **IDS
    )


def _pixtral() -> Any:
    return transformers.PixtralVisionConfig(**(JOINED | {"image_size": 128}))


def _mistral3() -> Any:
    return transformers.Mistral3Config(
        vision_config=_pixtral(),
        text_config=decoder("Mistral", sliding_window=None, head_dim=12),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **IDS,
    )


def _llava_pixtral() -> Any:
    return transformers.LlavaConfig(
        vision_config=_pixtral(),
        text_config=decoder("Mistral", sliding_window=None, head_dim=12),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **IDS,
    )


def _aya_vision() -> Any:
    return transformers.AyaVisionConfig(
        vision_config=tower("siglip", **JOINED),
        text_config=decoder("Cohere"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        **IDS,
    )


def _types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Gemma: which tokens are the image."""
    return {"token_type_ids": (ids == IMAGE).long()}


def _modalities(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Qwen: the same by another name."""
    return {"mm_token_type_ids": (ids == IMAGE).long()}


def _prefix(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """PaliGemma: the whole prompt is prefix."""
    return {"token_type_ids": torch.zeros_like(ids)}


def _plain(tiles: int) -> list[int]:
    return [IMAGE] * 16 * tiles


_sixteen: dict[str, Any] = {"tokens": _plain, "count": _one(4, 4), "sizes": (2, 1, 2)}
_gemma: dict[str, Any] = _sixteen | {
    "cls": "Gemma3ForConditionalGeneration",
    "images": _tiles(64),
    "tokens": lambda n: ([BREAK] + [IMAGE] * 16 + [END]) * n,
    "extra": _types,
}
_named: dict[str, Any] = _sixteen | {"images": _by_sample, "tokens": _named_tiles}
_patches: dict[str, Any] = _sixteen | {"images": _tiles(32), "joins": False}
_anyres: dict[str, Any] = {
    "images": _cropped,
    "tokens": lambda size: [IMAGE] * (16 + 4 * (size[1] // 8 + 1)),
    "count": lambda size: [(1, 16 + size[1] // 2)],
    "sizes": ((32, 64), (32, 32), (32, 48)),
    "joins": False,
}
_qwens: dict[str, Any] = {
    "images": _grids,
    "tokens": lambda size: [BREAK] + [IMAGE] * (size[0] * size[1]) + [END],
    "count": lambda size: [size],
    "sizes": ((4, 4), (3, 5), (2, 7)),
    "extra": _modalities,
}

LLAVA, NEXT, VISIONS = (
    f"Llava{name}ForConditionalGeneration" for name in ("", "Next", "Onevision")
)
TESTED: dict[str, Family] = {
    "LLaVA, CLIP": Family(LLAVA, lambda: _llava("clip"), has_cls=True, **_patches),
    "LLaVA, SigLIP": Family(LLAVA, lambda: _llava("siglip"), **_patches),
    "LLaVA, DINOv2": Family(LLAVA, lambda: _llava("dinov2"), has_cls=True, **_patches),
    "LLaVA-NeXT": Family(NEXT, lambda: _crops("LlavaNext"), has_cls=True, **_anyres),
    "LLaVA-OneVision": Family(VISIONS, lambda: _crops("LlavaOnevision"), **_anyres),
    "Qwen2-VL": Family("Qwen2VLForConditionalGeneration", lambda: _qwen("Qwen2VL"), **_qwens),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLForConditionalGeneration", lambda: _qwen("Qwen2_5_VL"), **_qwens
    ),
    "Qwen3-VL": Family("Qwen3VLForConditionalGeneration", lambda: _qwen("Qwen3VL"), **_qwens),
}
"""Families whose invariants have a test file of their own."""

FAMILIES: dict[str, Family] = {
    "InternVL": Family(
        "InternVLForConditionalGeneration", _internvl, _tiles(64), has_cls=True, **_sixteen
    ),
    "Idefics3": Family("Idefics3ForConditionalGeneration", lambda: _idefics("Idefics3"), **_named),
    "SmolVLM": Family("SmolVLMForConditionalGeneration", lambda: _idefics("SmolVLM"), **_named),
    "PaliGemma": Family("PaliGemmaForConditionalGeneration", _paligemma, extra=_prefix, **_patches),
    "Gemma 3": Family(config=lambda: _gemma3(20), **_gemma),
    "Gemma 3, no window": Family(config=lambda: _gemma3(0), **_gemma),
    "Mistral 3": Family(
        "Mistral3ForConditionalGeneration",
        _mistral3,
        _sized,
        _lines(16),
        count=lambda size: [(size[0] // 16, size[1] // 16)],
        sizes=((64, 48), (32, 80), (80, 80)),
    ),
    "LLaVA, Pixtral": Family(
        LLAVA,
        _llava_pixtral,
        _sized,
        _lines(8),
        count=lambda size: [(size[0] // 8, size[1] // 8)],
        sizes=((32, 24), (16, 40), (40, 40)),
    ),
    "Aya Vision": Family("AyaVisionForConditionalGeneration", _aya_vision, _tiles(64), **_sixteen),
}
"""All others: tests/families/test_families.py runs the invariants on each."""

VIDEOS: dict[str, Family] = {
    "LLaVA-NeXT-Video": Family(
        "LlavaNextVideoForConditionalGeneration",
        lambda: _crops("LlavaNextVideo"),
        has_cls=True,
        **_anyres,
    ),
    **{n: TESTED[n] for n in ("LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL")},
}
"""Families that take videos; their invariants are in tests/families/test_video.py."""

EVERY = TESTED | FAMILIES | VIDEOS
COLUMNS = [name for name in TESTED | FAMILIES if name != "Gemma 3, no window"]
"""Columns of the support matrix: no variants of one class that answer alike."""


def build(family: str, attention: str = "sdpa", seed: int = 0, gain: float = 4.0) -> Any:
    """A random model whose attention is far from uniform, in eval mode."""
    config = EVERY[family].config()
    config._attn_implementation = attention
    model = random_model(EVERY[family].cls, config, seed, gain)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


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
    made, g = EVERY[family], torch.Generator().manual_seed(seed)

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


def video(family: str, frames: int = 4, side: int = 2) -> dict[str, Tensor]:
    """A prompt with a video of frames of 2 x 2 tokens; Qwen3-VL has a time stamp for each.

    Args:
        side: of a frame, in tokens; others than 2 on Qwen-VL alone.
    """
    g = torch.Generator().manual_seed(0)
    n = frames * side**2
    if not family.startswith("Qwen"):
        newline = family == "LLaVA-OneVision"
        return {
            "input_ids": torch.tensor([[1, *[VIDEO] * (n + newline), 8, 9, 10]]),
            "pixel_values_videos": torch.randn(1, frames, 3, 32, 32, generator=g),
        }
    if family == "Qwen3-VL":
        tokens = [9, BREAK, *[VIDEO] * side**2, END] * frames
    else:
        tokens = [BREAK, *[VIDEO] * n, END]
    ids = torch.tensor([[1, *tokens, 8, 9, 10]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == VIDEO).long(),
        "pixel_values_videos": torch.randn(4 * n, 3 * 2 * 4**2, generator=g),
        "video_grid_thw": torch.tensor([[frames, 2 * side, 2 * side]]),
    }


def row_of(family: str, inputs: dict[str, Tensor], rows: list[list[Any]], r: int) -> dict[str, Any]:
    """One row of a batch without padding and mates."""
    real = inputs["attention_mask"][r].bool()
    first = sum(len(EVERY[family].count(s)) for row in rows[:r] for s in row)
    mine = slice(first, first + sum(len(EVERY[family].count(s)) for s in rows[r]))
    out = {}
    for name, x in inputs.items():
        if x.shape == inputs["input_ids"].shape:
            out[name] = x[r : r + 1, real]
        elif (
            name in ("pixel_values", "pixel_attention_mask")
            and len(x) == len(rows)
            and (EVERY[family].images is _by_sample)
        ):
            out[name] = x[r : r + 1, : mine.stop - mine.start]
        else:
            out[name] = x[mine]
    return out
