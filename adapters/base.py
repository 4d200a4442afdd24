# SPDX-License-Identifier: Apache-2.0
"""Sites that an adapter names: blocks, keys, decoder layers of a model. No method logic."""

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
        masked: call of ``attn`` -> (B, T) fp32, -inf on padding tokens that no query sees in this
            call, or None if there is none; the field is None where the encoder pads nothing.
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
    masked: Callable[[Call], Tensor | None] | None = None


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
        install: prepares the tower for the biases of its blocks and gives a handle, whose
            ``remove()`` undoes it; None where that needs nothing.
        readers: modules that read the tokens by cross-attention, called with
            ``encoder_hidden_states``; and the names of their arguments that mask those.
        whole: why no token may leave or merge inside this encoder, as the end of a sentence ("the
            tokens of all images are one sequence"); empty where they may.
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
    install: Callable[[], Any] | None = None
    readers: list[tuple[nn.Module, tuple[str, ...]]] = field(default_factory=list)
    whole: str = ""


@dataclass
class CropSites:
    """How a model cuts an image into crops and lays their patches out as one sequence.

    The flat rows of an image are its thumbnail, then the canvas of all crops row by row without
    padding, with a newline token at the end of each row. "call" is the named arguments of
    ``base.get_image_features``.

    Attributes:
        side: (rows, columns) of patches of one crop.
        newline: gives the embedding (D,) of the newline token.
        images: call -> for each image its (height, width) in pixels and its crops, thumbnail
            included.
        grid: (height, width) -> (rows, columns) of crops, thumbnail not included.
        pack: the model's own function for one image: features (crops, N, C), (height, width), a
            newline (C,), the call, and whether a canvas that is too large is resampled ->
            (rows, C).
    """

    side: tuple[int, int]
    newline: Callable[[], Tensor]
    images: Callable[[dict[str, Any]], list[tuple[tuple[int, int], int]]]
    grid: Callable[[tuple[int, int]], tuple[int, int]]
    pack: Callable[[Tensor, tuple[int, int], Tensor, dict[str, Any], bool], Tensor]


@dataclass
class GridSites:
    """A model whose LLM tokens are grids of joined encoder patches, one grid behind the other.

    Every LLM token of an image stands for ``fold`` x ``fold`` neighbouring patches of the encoder,
    which the model concatenates, pools or merges somewhere between encoder and LLM. One module
    there, ``source``, takes one row for each LLM token: that is where the features stage runs.
    Attention to the patches of a group is summed, their keys are averaged
    (`vtc.engine.vision.grids`).

    An image is what has one budget: what the processor calls an image where the model is told, else
    what the encoder sees as one (a tile). It consists of one or more grids (tiles, frames), which
    methods see as images of their own and which share its budget by their tokens. Where
    ``tokens_per_image`` is None, an image is one entry of ``pooler_output``.

    Tokens of the prompt between the grids of an image, such as row breaks and tile names, need no
    mention: only placeholders count, and all else is text. "call" is the named arguments of
    ``base.get_image_features``, for videos of ``base.get_video_features``.

    Attributes:
        images: call -> for each image, in the order of its placeholders, the (rows, columns) of
            *encoder patches* of each of its grids, in flat order. An LLM token's grid has
            rows // fold and columns // fold; what is left over never reaches the LLM.
        source: the module whose first argument is the features, one row for each LLM token of the
            call in placeholder order, flat (M, C) or batched (B, N, C).
        project: features (..., C) to the space of the LLM (..., D), row by row: ``source`` and all
            that comes behind it.
        fold: edge of the group of patches behind a token; 1 where a patch is a token.
        grouped: whether the encoder's sequence holds the patches of a group next to each other
            (Qwen-VL), rather than all patches of a grid in raster order.
        packed: whether the encoder runs the grids of all images as one sequence, (1, T, C) or
            (T, C), each attending to itself alone, rather than each as a row of a batch (B, T, C).
        order: call -> (T,) where in the encoder's sequence each patch lies, for encoders that sort
            them otherwise (windows); None: grid after grid. Only where ``packed``.
        newlines: rows behind those of each image or video in the flat features, which no method
            chooses among.
        shrink: edge of a grid of patches -> edge of its grid of LLM tokens, where the model resizes
            the projected patches bilinearly; ``source`` then takes one row for each patch.
        whole: block -> the block nearest to it whose attention sees whole grids, mostly itself, for
            encoders with windows: attention within windows says nothing of one against another.
        attended: (grid of encoder patches, block) -> lengths of the sequences that attend each
            within itself, for the cost model; None: the grid.
        weights: numbers in the matrices that a token goes through behind the blocks, for the cost
            model; None: two layers, from fold^2 C to D to D.
    """

    images: Callable[[dict[str, Any]], list[list[tuple[int, int]]]]
    source: nn.Module
    project: Callable[[Tensor], Tensor]
    fold: int = 1
    grouped: bool = False
    packed: bool = False
    order: Callable[[dict[str, Any]], Tensor | None] | None = None
    newlines: int = 0
    shrink: Callable[[int], int] | None = None
    whole: Callable[[int], int] | None = None
    attended: Callable[[tuple[int, int], int], list[int]] | None = None
    weights: int | None = None


@dataclass
class DecoderSites:
    """The language model behind a projector.

    Attributes:
        base: the module whose forward sees ``input_ids`` and merges image features.
        decoder: the language model with ``layers``, inside ``base``.
        projector: maps encoder features (B, N, C) to (B, N, D), token by token; where there are
            ``grids``, the module with which the encoder side ends.
        token_ids: ids of the image placeholders.
        tokens_per_image: placeholders of one image where that is fixed, else None.
        feature_block: index of the last encoder block whose output the projector reads.
        hidden, mlp_width, heads, kv_heads, head_dim, vocab: for the cost model.
        crops: how images of any resolution become flat; None where an image is one grid of patches.
        grids: how encoder patches are joined to LLM tokens; None where each of them is one.
        video: whether the model takes videos as well; refused where there are no ``videos``.
        videos: how frames of a video are joined to LLM tokens; a video is what has a budget, and
            its grids are the frames. The features come from ``base.get_video_features``.
        video_ids: ids of the video placeholders, where there are ``videos``.
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
    grids: GridSites | None = None
    video: bool = False
    videos: GridSites | None = None
    video_ids: tuple[int, ...] = ()
    mrope: bool = False
    delimited: bool = False


def language_sites(
    model: Any,
    base: Any,
    decoder: Any,
    projector: nn.Module,
    feature_block: int,
    tokens_per_image: int | None,
    token_ids: tuple[int, ...] | None = None,
) -> DecoderSites:
    """`DecoderSites` with what the text configuration says; ids default to ``image_token_id``."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    return DecoderSites(
        base=base,
        decoder=decoder,
        projector=projector,
        token_ids=(model.config.image_token_id,) if token_ids is None else token_ids,
        tokens_per_image=tokens_per_image,
        feature_block=feature_block,
        hidden=text.hidden_size,
        mlp_width=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
    )


@dataclass
class Sites:
    """A model as vtc sees it; ``decoder`` is None for an encoder alone.

    Attributes:
        notes: what a user should know of how the model was understood, as sentences.
        missing: stages that methods cannot act in here, and why.
    """

    family: str
    vision: VisionSites
    decoder: DecoderSites | None = None
    notes: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def is_a(x: object, *names: str) -> bool:
    """Whether the type of x or one of its bases has such a name, without importing its library."""
    known = {name for t in type(x).__mro__ for name in (t.__name__, f"{t.__module__}.{t.__name__}")}
    return not known.isdisjoint(names)


def mlp_width(mlp: nn.Module) -> int:
    """Hidden width of an MLP: what its last linear layer takes in."""
    last = [m for m in mlp.modules() if isinstance(m, nn.Linear)][-1]
    return max(last.in_features, last.out_features)
