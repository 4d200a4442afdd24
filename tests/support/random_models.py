# SPDX-License-Identifier: Apache-2.0
"""Random geometries of every family, prompts for them, methods and budgets: one `Case` each.

Every field is drawn small things first, so that hypothesis shrinks a failure to one layer, one
head, one token, one row, "random", one token kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import mini_anyres
import torch
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support import mini_families as mini
from vtc.benchmarks.support.mini_families import IMAGE, Family

ORIGINAL = dict(mini.EVERY)
FAMILIES = [f for f in mini.EVERY if f not in ("LLaVA-NeXT-Video", "Gemma 3, no window")]
TOWERS = {"LLaVA, CLIP", "LLaVA, SigLIP", "LLaVA, DINOv2"}
SQUARE = TOWERS | {"PaliGemma", "InternVL", "Aya Vision"}
"""Families whose image size is drawn; the others have tiles of 4 x 4 tokens, or images of any."""
PACKED = {"LLaVA-NeXT": "next", "LLaVA-OneVision": "onevision"}
FIXED_HEADS = {"Qwen2-VL", "Qwen2.5-VL"}
"""Rotary sections of theirs fit 4 heads of 12 channels."""
WIDTH = 48


@dataclass(frozen=True)
class Geometry:
    """A model: everything else is as in benchmarks/support/mini_families.py.

    Attributes:
        layers, heads, kv_heads: of the LLM; blocks, vision_heads: of the tower.
        grid: LLM tokens each way of an image, where it has one size.
        feature_layer: which output of the tower LLaVA takes.
        decoder, window: the LLM of LLaVA; its sliding window, that of Gemma 3 too, or None.
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    blocks: int
    vision_heads: int
    grid: int
    feature_layer: int
    decoder: str
    window: int | None
    attention: str
    gain: float


@dataclass(frozen=True)
class RandomPrompt:
    """Rows of (words in front, ((image size, words behind it), ...)), and the padding side."""

    rows: tuple[tuple[int, tuple[tuple[Any, int], ...]], ...]
    pad: str

    @property
    def images(self) -> list[list[Any]]:
        return [[size for size, _ in row] for _, row in self.rows]


@dataclass(frozen=True)
class Case:
    """A model, a prompt, methods with budgets in order, and how the answer is decoded."""

    model: Geometry
    prompt: RandomPrompt
    methods: tuple[tuple[str, int | Fraction | None], ...]
    style: str


# ---- models --------------------------------------------------------------------------------------


def family_of(g: Geometry) -> Family:
    """The family with what of it depends on the geometry."""
    made, n = ORIGINAL[g.family], g.grid**2
    base = made.config
    if g.family in TOWERS:

        def llava() -> Any:
            config = base()
            sliding: dict[str, Any] = {"sliding_window": g.window}
            if g.decoder == "Qwen2":
                sliding |= {"use_sliding_window": g.window is not None, "max_window_layers": 1}
            config.text_config = mini.decoder(g.decoder, **sliding if g.decoder != "Llama" else {})
            config.vision_feature_layer = g.feature_layer
            return config

        made = replace(made, config=llava)
    if g.family == "Gemma 3":
        made = replace(made, config=lambda: mini._gemma3(g.window or 0))
    if g.family in SQUARE:
        edge = g.grid * (8 if not made.joins else 16)
        made = replace(
            made,
            images=mini._tiles(edge),
            tokens=lambda tiles: [IMAGE] * n * tiles,
            count=lambda tiles: [(g.grid, g.grid)] * tiles,
        )
    if g.family in PACKED:
        kind = PACKED[g.family]

        def packed() -> Any:
            config = base()
            config.image_grid_pinpoints = mini_anyres.POINTS
            if kind == "onevision":
                config.vision_aspect_ratio = "anyres_max_4"
            return config

        def tokens(size: Any) -> list[int]:
            rows, columns = mini_anyres.shape_of(size, kind)
            return [IMAGE] * (mini_anyres.PATCHES + rows * (columns + 1))

        made = replace(
            made,
            config=packed,
            images=_crops,
            tokens=tokens,
            count=lambda size: [(1, mini_anyres.patches_of(size, kind))],
        )
    return made


def _crops(g: torch.Generator, rows: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """Thumbnail and crops of each image, as many slots as the image with most has."""
    sizes = [size for row in rows for size in row]
    counts = [1 + r * c for r, c in map(mini_anyres.grid_of, sizes)]
    pixels = torch.zeros(len(sizes), max(counts), 3, mini_anyres.SIZE, mini_anyres.SIZE)
    for i, n in enumerate(counts):
        pixels[i, :n] = torch.randn(pixels[i, :n].shape, generator=g)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def build(g: Geometry) -> Any:
    """The random model, in eval mode."""
    text = {
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
    }
    vision = {"num_hidden_layers": g.blocks, "num_attention_heads": g.vision_heads}
    edges = (8 * g.grid, 16 * g.grid) if g.family in SQUARE else (32, 64)
    with (
        patch.dict(mini.TEXT, text),
        patch.dict(mini.VISION, vision | {"image_size": edges[0]}),
        patch.dict(mini.JOINED, vision | {"image_size": edges[1]}),
        patch.dict(mini.EVERY, {g.family: family_of(g)}),
    ):
        return mini.build(g.family, g.attention, gain=g.gain)


def inputs_of(case: Case) -> dict[str, Tensor]:
    """Token ids, mask and pixels of a case."""
    made, g, ids = family_of(case.model), torch.Generator().manual_seed(0), []

    def words(k: int) -> list[int]:
        return torch.randint(5, 50, (k,), generator=g).tolist()

    for before, row in case.prompt.rows:
        line = words(before)
        for size, behind in row:
            line += made.tokens(size) + words(behind)
        ids.append(line)
    out = mini.padded(ids, case.prompt.pad)
    out |= made.extra(out["input_ids"], out["attention_mask"])
    return out | (made.images(g, case.prompt.images) if any(case.prompt.images) else {})


def row_of(case: Case, inputs: dict[str, Tensor], r: int) -> dict[str, Tensor]:
    """One row of a batch without padding and mates."""
    rows, family = case.prompt.images, case.model.family
    with patch.dict(mini.EVERY, {family: family_of(case.model)}):
        out = mini.row_of(family, inputs, rows, r)
    if "image_grid_thw" in inputs:  # Qwen: the patches of all images are one sequence
        parts = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())
        first = sum(map(len, rows[:r]))
        out["pixel_values"] = torch.cat([*parts[first : first + len(rows[r])], parts[0][:0]])
    shared = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: x for name, x in out.items() if rows[r] or name in shared}


def units(case: Case) -> list[list[tuple[int, int]]]:
    """(rows, columns) of each budget unit of each row of the prompt."""
    count = family_of(case.model).count
    return [[grid for size in row for grid in count(size)] for row in case.prompt.images]


# ---- methods -------------------------------------------------------------------------------------


def make(name: str, keep: int | Fraction | None, g: Geometry) -> vtc.Method:
    """A method with its budget, and its substitutes for what the family lacks."""
    if name == "mod":
        routers = {g.layers - 1: torch.linspace(-1, 1, WIDTH)}
        return vtc.methods()[name](routers=routers)  # type: ignore[call-arg]
    known = mini.EVERY[g.family]
    try:
        method = seeded(name, keep, 0)
    except ValueError:  # takes no budget
        method = seeded(name, None, 0)
    if not known.has_cls:
        method = replace(method, **method.without_cls)
    return replace(method, **method.outside_encoder) if known.joins else method


def methods_of(case: Case) -> list[vtc.Method]:
    return [make(name, keep, case.model) for name, keep in case.methods]


def fits(name: str, g: Geometry) -> bool:
    """Whether the family has what the method needs: the others' refusals are tested elsewhere."""
    method, known = make(name, 1, g), ORIGINAL[g.family]
    inside = known.joins and method.stages & {"pixels", "vision"}
    return not inside and ("cls" not in method.needs or known.has_cls)


NAMES = sorted(
    (m for m, cls in vtc.methods().items() if "frames" not in cls.needs),
    key=lambda m: (m not in ("random", "fastv"), m),
)
"""All but those for videos, simple ones first."""
EXACT = [m for m in NAMES if m != "vidkv"]
"""All that drop tokens; VidKV packs the KV cache into fewer bits."""
BUDGETED = [m for m in EXACT if m not in ("mod", "mod-heuristic")]
"""Those that leave a prompt alone when all of it may stay; MoD lets a share of tokens bypass layers."""


# ---- strategies ----------------------------------------------------------------------------------


@st.composite
def geometries(draw: Any) -> Geometry:
    family = draw(st.sampled_from(FAMILIES))
    heads = 4 if family in FIXED_HEADS else draw(st.sampled_from((1, 2, 4)))
    decoder = draw(st.sampled_from(("Llama", "Mistral", "Qwen2"))) if family in TOWERS else "Llama"
    slides = decoder != "Llama" or family == "Gemma 3"
    deep = draw(st.sampled_from((-1, -2))) if family in TOWERS else -1
    least = 2 if deep == -2 or family in PACKED else 1
    return Geometry(
        family=family,
        layers=draw(st.integers(4 if family == "Qwen3-VL" else 1, 6)),
        heads=heads,
        kv_heads=draw(st.sampled_from([k for k in (1, 2, 4) if k <= heads])),
        blocks=draw(st.integers(least, 4)),
        vision_heads=draw(st.sampled_from((1, 2, 4))),
        grid=draw(st.integers(1, 5)) if family in SQUARE else 4,
        feature_layer=deep,
        decoder=decoder,
        window=draw(st.sampled_from((None, 3, 8, 20))) if slides else None,
        attention=draw(st.sampled_from(("sdpa", "eager"))),
        gain=draw(st.sampled_from((1.0, 4.0))),
    )


def sizes(family: str) -> st.SearchStrategy[Any]:
    """Image sizes in the units of the family, odd aspect ratios among them."""
    if family in PACKED:
        return st.tuples(st.integers(4, 110), st.integers(4, 110))
    unit = {"Mistral 3": 16, "LLaVA, Pixtral": 8}.get(family, 1)
    if unit > 1 or family.startswith("Qwen"):
        edge = st.integers(1, 6).map(lambda n: n * unit)
        wide = edge.filter(lambda n: n > 16)  # transformers: no Mistral 3 image of one token
        return st.tuples(edge, wide if family == "Mistral 3" else edge)
    return st.integers(1, 3)


@st.composite
def prompts(draw: Any, family: str) -> RandomPrompt:
    few = st.integers(0, 5)
    image = st.tuples(sizes(family), few)
    row = st.tuples(few, st.lists(image, max_size=3).map(tuple)).filter(lambda r: r[0] or r[1])
    rows = draw(st.lists(row, min_size=1, max_size=4))
    return RandomPrompt(tuple(rows), draw(st.sampled_from(("left", "right"))))


budgets = st.one_of(
    st.integers(1, 24),
    st.sampled_from((Fraction(1, 100), Fraction(1, 4), Fraction(1, 2), Fraction(9, 10))),
)


@st.composite
def cases(draw: Any, names: Any = NAMES, keep: Any = budgets, longest: int = 3) -> Case:
    """Chains of up to so many methods."""
    model = draw(geometries())
    usable = [m for m in names if fits(m, model)]
    method = st.tuples(st.sampled_from(usable), keep)
    return Case(
        model,
        draw(prompts(model.family)),
        tuple(draw(st.lists(method, min_size=1, max_size=longest))),
        draw(st.sampled_from(("forward", "generate", "two turns"))),
    )
