# SPDX-License-Identifier: Apache-2.0
"""What an adapter says of a model: where blocks, keys and decoder layers are. No method logic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module call."""


@dataclass
class BlockSites:
    """One encoder block ``x + f(attn(norm1(x)))``, then ``x + g(mlp(norm2(x)))``.

    Attributes:
        module: the block; its output is the new (B, T, C) hidden state (bare, or first of a tuple).
        attn, norm2, mlp: its attention, second norm and MLP.
        heads, scale: number of heads and the factor on q k^T.
        query, key: (call of ``attn``, token rows) -> (B, H, rows, d), recomputed from the weights,
            as attention sees them (norms and rotary embedding included).
        bias: adds a key bias (B, T), fp32, to a call of ``attn``; None if it takes no mask.
        key_source: the module whose output holds the keys, captured for free; None without one.
        split: (that module's output, call of ``attn``) -> (B, H, T, d).
        key_mean: call of ``attn`` -> (B, T, d) head-averaged keys, where nothing captures them and
            averaging the weights first is cheaper.
        gather: shortens per-token arguments of a block call, such as rotary tables, to survivors
            (B, T') of the original T tokens; None when a block takes none.
    """

    module: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    heads: int
    scale: float
    query: Callable[[Call, slice], Tensor]
    key: Callable[[Call, slice], Tensor]
    bias: Callable[[Call, Tensor], Call] | None
    key_source: nn.Module | None = None
    split: Callable[[Tensor, Call], Tensor] | None = None
    key_mean: Callable[[Call], Tensor] | None = None
    gather: Callable[[Call, Tensor], Call] | None = None


@dataclass
class PackedSites:
    """A tower that takes patches of images of any size as one sequence (S, C), without a batch.

    Behind its blocks ``edge`` x ``edge`` patches, which follow each other, become one LLM token.
    Grids are (frames, rows, columns) of LLM tokens.

    Attributes:
        edge: patches along each side of the square behind one LLM token.
        joined: the module that gets the patches of each square side by side, (M, edge^2 C).
        project: what happens from there on, (M, edge^2 C) -> (M, D).
        order: grids of the images -> (M,) for each of their tokens, in raster order, which one it
            is in the order of the blocks; None where that order is the same.
        whole: block -> the block nearest to it whose attention sees whole images, mostly itself.
        attended: (grid of an image, block) -> lengths in patches of the sequences that attend each
            within itself, for the cost model.
        values: numbers in a patch of pixels; weights: of all mergers, for the cost model.
    """

    edge: int
    joined: nn.Module
    project: Callable[[Tensor], Tensor]
    order: Callable[[list[tuple[int, int, int]]], Tensor | None]
    whole: Callable[[int], int]
    attended: Callable[[tuple[int, int, int], int], list[int]]
    values: int
    weights: int


@dataclass
class VisionSites:
    """A vision encoder.

    Attributes:
        tower: the module whose forward takes the pixels.
        blocks: its blocks in order.
        prefix: tokens in front of the patches; has_cls: the first of them is a class token.
        patch: patch edge in pixels.
        pool: how the encoder's own head reads the tokens: "cls", "mean", "map" (attention pooling)
            or "none".
        width, mlp_width: C and the hidden width of the MLP, for the cost model.
        resize: adapts a call of ``entry`` to pixels of another size (position table interpolation);
            None when the encoder cannot take them.
        entry: the module that first gets the pixels, where other methods than ``tower.forward``
            lead to it as well (``forward_features``); the tower itself when None.
        packed: how images follow each other in one sequence; None where they have a batch.
    """

    tower: nn.Module
    blocks: list[BlockSites]
    prefix: int
    has_cls: bool
    patch: int
    pool: str
    width: int
    mlp_width: int
    resize: Callable[[Call], Call] | None = None
    entry: nn.Module | None = None
    packed: PackedSites | None = None


@dataclass
class CropSites:
    """How a model cuts an image into crops and packs their patches into one sequence.

    The packed rows of an image are its thumbnail, then the canvas of all crops row by row without
    padding, with a newline token at the end of each row. "call" is the named arguments of
    ``base.get_image_features``.

    Attributes:
        side: (rows, columns) of patches of one crop.
        newline: gives the embedding (D,) of the newline token.
        images: call -> for each image its (height, width) in pixels and its crops, thumbnail
            included.
        grid: (height, width) -> (rows, columns) of crops, thumbnail not included.
        pack: the model's own packing of one image: features (crops, N, C), (height, width), a
            newline (C,), the call, and whether a canvas that is too large is resampled ->
            (rows, C).
    """

    side: tuple[int, int]
    newline: Callable[[], Tensor]
    images: Callable[[dict[str, Any]], list[tuple[tuple[int, int], int]]]
    grid: Callable[[tuple[int, int]], tuple[int, int]]
    pack: Callable[[Tensor, tuple[int, int], Tensor, dict[str, Any], bool], Tensor]


@dataclass
class DecoderSites:
    """The language model behind a projector.

    Attributes:
        base: the module whose forward sees ``input_ids`` and merges image features.
        decoder: the language model with ``layers``, inside ``base``.
        projector: maps encoder features (B, N, C) to (B, N, D), token by token.
        token_ids: ids of the image placeholders.
        tokens_per_image: placeholders of one image where that is fixed, else None.
        feature_block: index of the last encoder block whose output the projector reads.
        hidden, mlp_width, heads, kv_heads, head_dim, vocab: for the cost model.
        crops: how images of any resolution are packed; None where an image is one grid of patches.
        video: whether the model takes videos as well, which vtc does not compress yet.
        mrope: positions have axes of time, height and width, so they cannot be renumbered.
        delimited: other tokens stand in front of and behind every image, so that one that starts
            or ends with the prompt is a part of an image.
    """

    base: Any
    decoder: Any
    projector: Any
    token_ids: tuple[int, ...]
    tokens_per_image: int | None
    feature_block: int
    hidden: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    crops: CropSites | None = None
    video: bool = False
    mrope: bool = False
    delimited: bool = False


@dataclass
class Sites:
    """A model as vtc sees it; ``decoder`` is None for an encoder alone."""

    family: str
    vision: VisionSites
    decoder: DecoderSites | None = None
    notes: list[str] = field(default_factory=list)


def is_a(x: object, *names: str) -> bool:
    """Whether the type of x or one of its bases has such a name, without importing its library."""
    known = {name for t in type(x).__mro__ for name in (t.__name__, f"{t.__module__}.{t.__name__}")}
    return not known.isdisjoint(names)


def mlp_width(mlp: nn.Module) -> int:
    """Hidden width of an MLP: what its last linear layer takes in."""
    last = [m for m in mlp.modules() if isinstance(m, nn.Linear)][-1]
    return max(last.in_features, last.out_features)
