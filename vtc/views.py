# SPDX-License-Identifier: Apache-2.0
"""The read-only views that methods get: one class for each stage of the model.

Everything expensive is lazy: what a method does not ask for is not computed, and no view ever
holds attention for the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .errors import UnsupportedError
from .kernels.attention_reduce import column_sums
from .reduction import Reduction, gather_tokens

if TYPE_CHECKING:
    from functools import cached_property

    from .crops import CropLayout
    from .method import Method
else:

    class cached_property:
        """functools' without its lock (Python 3.11 and older), which torch.compile cannot trace."""

        def __init__(self, compute: Callable[[Any], Any]) -> None:
            self.compute = compute
            self.__doc__ = compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self.name = name

        def __get__(self, view: Any, owner: type | None = None) -> Any:
            if view is None:  # pragma: no cover (asked of the class, by help())
                return self
            value = self.compute(view)
            setattr(view, self.name, value)  # found before this descriptor from now on
            return value


How = Literal["sum", "mean"]


def fold(reduction: Reduction | None, x: Tensor, how: How) -> Tensor:
    """x (B, T, ...), reduced like tokens: each survivor gets the sum or the mean of its group."""
    if reduction is None:
        return x
    total = reduction.sum(x)
    return total if how == "sum" else total / reduction.sum(torch.ones_like(x)).clamp(min=1)


Watched = tuple[dict[str, Tensor], Tensor | None]
"""What a method chooses among, tensors (B, T, ...) by name; (B, T) bool, the tokens that count."""


@dataclass
class Projections:
    """Queries and keys of one encoder block, captured or recomputed on demand.

    Attributes:
        query: gives (B, H, T, d) for the token rows asked for (a slice of T).
        key: gives (B, H, T, d).
        scale: the factor on q k^T.
        bias: (B, T) additive bias on the keys in this block (proportional attention), or None.
        later: the reduction applied to this block's tokens after its attention, or None.
        mean: gives (B, T, d) head-averaged keys where that is cheaper than averaging ``key()``.
        lengths: tokens of each of the sequences that lie one behind the other in this one and do
            not see each other (`received` knows, `attention` does not); None where there is one.
        whole: of the nearest block that sees whole images, where this one sees windows only.
    """

    query: Callable[[slice], Tensor]
    key: Callable[[], Tensor]
    scale: float
    bias: Tensor | None = None
    later: Reduction | None = None
    mean: Callable[[], Tensor] | None = None
    lengths: list[int] | None = None
    whole: Projections | None = None

    def key_mean(self) -> Tensor:
        """(B, T, d) keys averaged over heads."""
        return self.key().mean(1) if self.mean is None else self.mean()

    def fold(self, x: Tensor, how: How) -> Tensor:
        """x (B, T, ...) of this block's tokens, reduced like the tokens have been since."""
        return fold(self.later, x, how)

    def logits(self, rows: slice) -> Tensor:
        """q k^T * scale in fp32 for the query rows, (B, H, rows, T)."""
        scores = self.query(rows).float() @ self.key().float().transpose(-1, -2) * self.scale
        bias = self.bias
        return scores if bias is None else scores + bias[:, None, None, :].to(scores)

    def attention(self, rows: slice) -> Tensor:
        """Attention probabilities in fp32 for the query rows, (B, H, rows, T)."""
        return self.logits(rows).softmax(-1)

    def received(self, weights: Tensor | None = None, chunk: int = 256) -> Tensor:
        """(B, H, T) attention in fp32 that each key receives from all query rows: A^T w.

        Args:
            weights: (B, H, T) w of the rows; ones when None.
            chunk: query rows held at once where there is a bias.
        """
        key = self.key()
        if self.bias is None:  # each sequence by itself: a batch is padded to the longest
            lengths = [key.shape[2]] if self.lengths is None else self.lengths
            queries, keys = (x.split(lengths, 2) for x in (self.query(slice(None)), key))
            ws = [None] * len(lengths) if weights is None else weights.split(lengths, 2)
            parts = zip(queries, keys, ws, strict=True)
            return torch.cat(
                [column_sums(q, k, weights=w, scale=self.scale) for q, k, w in parts], 2
            )
        total: Any = 0.0
        for start in range(0, key.shape[2], chunk):
            rows = slice(start, start + chunk)
            part = self.attention(rows)
            total = total + (part if weights is None else part * weights[:, :, rows, None]).sum(2)
        return total

    def folded_attention(self) -> Tensor:
        """(B, H, T', T') probabilities in fp32 among the T' tokens left of this block's tokens.

        A query row is the mean of its group, a key column the sum of its group.
        """
        rows = self.attention(slice(None))
        if self.later is None:
            return rows
        rows = self.fold(rows.permute(0, 3, 1, 2), "sum")  # keys first, then queries
        return self.fold(rows.transpose(1, 3), "mean").permute(0, 2, 1, 3)

    def by_heads(self, most: int = 1 << 24) -> list[Projections]:
        """The same block, a few heads at a time, for who needs maps of all of them in turn.

        Args:
            most: weights of the maps of a few heads; one head may have more.
        """
        query, key = self.query(slice(None)), self.key()
        batch, _, tokens, _ = key.shape
        chunk = min(4, max(1, most // (batch * tokens**2)))

        def part(heads: slice) -> Projections:
            q, k = query[:, heads], key[:, heads]
            return replace(self, query=lambda rows: q[:, :, rows], key=lambda: k, mean=None)

        return [part(slice(i, i + chunk)) for i in range(0, query.shape[1], chunk)]


@dataclass
class VisionView:
    """Inside one encoder block. T counts prefix tokens ([CLS], distillation, registers) too.

    Attributes:
        x: (B, T, C) hidden states, after the attention residual or at the block's output.
        layer: 0-based block index; depth: number of blocks whose output matters to the model.
        prefix: tokens in front that must survive; has_cls: the first of them is a class token.
        size: (B, T) patches behind each token.
        total: patches of the full grid; grid: (rows, columns).
        scratch: this method's named tensors (B, T, ...), gathered with the survivors.
        places: (B, N) patch of the full grid each patch token stands at; None while all are there.
        valid: (B, T) bool, False on padding where images keep different numbers; None if none does.
    """

    x: Tensor
    layer: int
    depth: int
    prefix: int
    has_cls: bool
    size: Tensor
    total: int
    grid: tuple[int, int]
    projections: Projections
    scratch: dict[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None
    valid: Tensor | None = None

    @property
    def watched(self) -> Watched:
        return {"tokens": self.x}, self.valid

    @property
    def count(self) -> int:
        """Patch tokens now, without the prefix."""
        return self.x.shape[1] - self.prefix

    @property
    def index(self) -> Tensor:
        """(B, N) patch of the full grid that each patch token stands at."""
        if self.places is not None:
            return self.places
        return torch.arange(self.count, device=self.x.device).expand(len(self.x), -1)

    def in_sequence(self, index: Tensor) -> Tensor:
        """(B, prefix + K) places in the sequence: the prefix, then patches (B, K); -1 stays -1."""
        front = torch.arange(self.prefix, device=index.device).expand(len(index), -1)
        return torch.cat([front, index + self.prefix * (index >= 0)], 1)

    @cached_property
    def key(self) -> Tensor:
        """(B, H, T, d) keys of this block, as attention sees them."""
        return self.projections.fold(self.projections.key().transpose(1, 2), "mean").transpose(1, 2)

    @cached_property
    def key_mean(self) -> Tensor:
        """(B, T, d) keys averaged over heads."""
        return self.projections.fold(self.projections.key_mean(), "mean")

    @cached_property
    def attention(self) -> Tensor:
        """(B, H, T, T) attention of this block, fp32."""
        return self.projections.folded_attention()

    @cached_property
    def cls_attention(self) -> Tensor:
        """(B, H, T) attention row of the class token, fp32, prefix columns included."""
        if not self.has_cls:
            raise UnsupportedError("this encoder has no [CLS] token")
        row = self.projections.attention(slice(0, 1))[:, :, 0]
        return self.projections.fold(row.transpose(1, 2), "sum").transpose(1, 2)


@dataclass
class FeaturesView:
    """Between encoder and LLM; B counts images, N the patch tokens that reach this point.

    Views are rectangular: images of different sizes come in views of their own. On models that cut
    an image into crops, the thumbnail and the part of each crop that is not padding are images here
    and share the budget of the image by their patches; ``grid``, ``index`` and ``total`` are of
    that part. A method with ``joint = True`` gets all patches of one image instead (B = 1), in the
    order in which the model packs them, and `crops` says where they lie. The frames of a video are
    images here too, and share the video's budget by their tokens; a method with ``joint = True``
    gets all of them, and `frame` says which each token lies in.

    Attributes:
        features: (B, N, C) encoder features, no prefix tokens.
        size: (B, N) patches behind each; index: (B, N) patch each stands at in the full grid.
        total: patches of the full grid; grid: (rows, columns).
        scratch: this method's named tensors (B, N, ...).
        crops: layout of the image in a joint view of a model with crops, else None.
        frame: (B, N) frame that each token lies in, in a joint view of a video, else None.
        frames: how many frames the video of a joint view has, else None.
        image: (B,) which of the forward's images each row is of; None where row i is image i.
        images: how many images there are in all views of the forward; None where image is None.
    """

    features: Tensor
    size: Tensor
    index: Tensor
    total: int
    grid: tuple[int, int]
    prefix: int
    has_cls: bool
    projector: Callable[[Tensor], Tensor]
    layers: dict[int, Projections]
    depth: int
    scratch: dict[str, Tensor] = field(default_factory=dict)
    crops: CropLayout | None = None
    frame: Tensor | None = None
    frames: int | None = None
    image: Tensor | None = None
    images: int | None = None
    share: int | None = None  # of the image's budget, where the engine has divided it
    packed: Tensor | None = None  # (B, N, D) where the projector has run already
    arrange: Callable[[Any, How, Callable[[], Tensor]], Tensor] | None = None

    valid: ClassVar[None] = None  # views are rectangular

    @property
    def watched(self) -> Watched:
        read = {"projected features": self.projected} if "projected" in vars(self) else {}
        return {"features": self.features, **read}, None

    @property
    def count(self) -> int:
        """N, the patch tokens now."""
        return self.features.shape[1]

    def budget(self, method: Method) -> int:
        """Tokens the method keeps of each image or crop in this view, at most `count`."""
        share = method.budget(self.total, self.grid) if self.share is None else self.share
        return min(share, self.count)

    @cached_property
    def projected(self) -> Tensor:
        """(B, N, D) features in the space of the LLM."""
        return self.projector(self.features) if self.packed is None else self.packed

    def _layer(self, layer: int) -> Projections:
        return self.layers[layer % self.depth]

    def _patches(self, what: str, layer: int, how: How, compute: Callable[[], Tensor]) -> Tensor:
        """Patch columns of compute() (B, T, ...), folded like the tokens since that layer.

        Where views are parts of what the encoder has seen, the engine arranges them, and keeps
        ``what`` of a layer for the other views.
        """

        def patches() -> Tensor:
            return self._layer(layer).fold(compute(), how)[:, self.prefix :]

        if self.arrange is None:
            return patches()
        return self.arrange((what, layer % self.depth), how, patches)

    def cls_attention(self, layer: int) -> Tensor:
        """(B, H, N) attention of [CLS] to the patches in block ``layer``, softmax over all keys."""
        if not self.has_cls:
            raise UnsupportedError("this encoder has no [CLS] token")

        def row() -> Tensor:
            return self._layer(layer).attention(slice(0, 1))[:, :, 0].transpose(1, 2)

        return self._patches("cls_attention", layer, "sum", row).transpose(1, 2)

    def cls_logits(self, layer: int) -> Tensor:
        """(B, H, N) scores q_cls k / sqrt(d) before the softmax in block ``layer``."""
        if not self.has_cls:
            raise UnsupportedError("this encoder has no [CLS] token")

        def row() -> Tensor:
            return self._layer(layer).logits(slice(0, 1))[:, :, 0].transpose(1, 2)

        return self._patches("cls_logits", layer, "mean", row).transpose(1, 2)

    def cls_similarity(self, layer: int) -> Tensor:
        """(B, N) softmax over all keys of q_cls k / sqrt(C) in block ``layer``, heads as one."""
        if not self.has_cls:
            raise UnsupportedError("this encoder has no [CLS] token")

        def row() -> Tensor:
            heads = self._layer(layer).logits(slice(0, 1))[:, :, 0]  # q k / sqrt(d), C = H d
            return (heads.sum(1) / heads.shape[1] ** 0.5).softmax(-1)

        return self._patches("cls_similarity", layer, "sum", row)

    def attention_received(self, layer: int) -> Tensor:
        """(B, N) attention a patch receives in block ``layer``, mean over heads and query rows.

        Where that block attends within windows (Qwen2.5-VL), in the nearest block that does not:
        windows would all get the same.

        The published substitute for [CLS] attention on towers without one (VisionZip, VisPruner).
        """
        projections = self._layer(layer)
        if projections.whole is not None:
            projections = projections.whole

        def mean() -> Tensor:
            total, lengths = projections.received().mean(1), projections.lengths
            if lengths is None:
                return total / total.shape[1]
            n = torch.tensor(lengths, device=total.device)
            return total / n.repeat_interleave(n)

        return self._patches("attention_received", layer, "sum", mean)

    def key(self, layer: int) -> Tensor:
        """(B, N, H, d) keys of block ``layer``."""
        projections = self._layer(layer)
        return self._patches("key", layer, "mean", lambda: projections.key().transpose(1, 2))


@dataclass
class DecoderView:
    """Between two LLM layers at prefill; N counts visual tokens, padded to the longest row.

    Attributes:
        hidden: (B, T, D) hidden states of the current sequence, the input of layer ``layer + 1``.
        layer: 0-based index of the layer that has just run, -1 before the first; depth: all layers.
        visual: (B, T) bool, visual tokens; text: (B, T) bool, other tokens that are not padding.
        separator: (B, T) bool, newlines between rows of patches, which are neither; None without.
        visual_index: (B, N) columns of the visual tokens; valid: (B, N) bool, None if rectangular.
        image: (B, N) ordinal of the image in its row; position: (B, N) patch index in that image.
        images: number of images of each row, a list of per-image visual token counts.
        scratch: this method's named tensors (B, N, ...), gathered with the survivors.
        ran: (B, T) place of each token in the sequence that the layer has run on, where an earlier
            method of the chain has dropped some since; None if all are there.
        memo: this method's named tensors of this forward without a visual token axis (B, ...),
            never gathered; text tokens never leave, so notes in the order of `text_index` hold.
        unnoted: whether the scratch is zero for an image that was encoded elsewhere.
    """

    hidden: Tensor
    layer: int
    depth: int
    visual: Tensor
    text: Tensor
    visual_index: Tensor
    valid: Tensor | None
    image: Tensor
    position: Tensor
    images: list[list[int]]
    tap: Any
    ahead: Callable[[], Any]
    ran: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    memo: dict[str, Tensor] = field(default_factory=dict)
    separator: Tensor | None = None
    unnoted: bool = False

    @property
    def watched(self) -> Watched:
        """The text too, which tokens are ranked by."""
        return {"hidden states": self.hidden}, self.visual | self.text

    @property
    def count(self) -> int:
        """N, visual tokens now (of the longest row)."""
        return self.visual_index.shape[1]

    def per_row(self, tokens: Callable[[int], int]) -> int | Tensor:
        """Visual tokens of each row, summed over its images: one int if rows agree, else (B,).

        Args:
            tokens: of an image with n visual tokens in the prompt, how many.
        """
        counts = [sum(tokens(n) for n in row) for row in self.images]
        if len(set(counts)) == 1 and self.valid is None:
            return min(counts[0], self.count)
        return torch.tensor(counts, device=self.hidden.device)

    def budget(self, method: Method) -> int | Tensor:
        """Visual tokens each row keeps: one int when all rows agree, else (B,) int64."""
        return self.per_row(method.budget)

    def within(self, tokens: Callable[[int], int]) -> bool:
        """True when no row has more visual tokens than `per_row` would give it."""
        now = [self.count] * len(self.images) if self.valid is None else self.valid.sum(1).tolist()
        return all(
            n <= sum(tokens(i) for i in row) for n, row in zip(now, self.images, strict=True)
        )

    def within_budget(self, method: Method) -> bool:
        """True when no row has more visual tokens than the method would keep."""
        return self.within(method.budget)

    def noted(self, name: str) -> Tensor:
        """What this method noted in its scratch while images were encoded, (B, N, ...).

        Raises:
            UnsupportedError: nothing on some of them, which were encoded without it.
        """
        if name not in self.scratch or self.unnoted:
            raise UnsupportedError(
                "image features that were not made by the wrapped model reached the language "
                "model, and the method needs notes it takes while encoding; encode and prefill in "
                "one call"
            )
        return self.scratch[name]

    @cached_property
    def tokens(self) -> Tensor:
        """(B, N, D) hidden states of the visual tokens."""
        return gather_tokens(self.hidden, self.visual_index)

    @cached_property
    def last_row(self) -> Tensor:
        """(B,) column of the last token of each row that is not padding."""
        columns = torch.arange(self.text.shape[1], device=self.text.device)
        real = self.text | self.visual
        real = real if self.separator is None else real | self.separator
        return (columns * real).amax(1)

    @cached_property
    def prompt(self) -> Tensor:
        """(B, T) bool, text behind the last image; the last token where there is none."""
        columns = torch.arange(self.text.shape[1], device=self.text.device).expand_as(self.text)
        last_visual = columns.where(self.visual, -1).amax(1, keepdim=True)
        rows = self.text & (columns > last_visual)
        return rows.where(rows.any(1, keepdim=True), columns == self.last_row[:, None])

    @cached_property
    def text_index(self) -> tuple[Tensor, Tensor]:
        """Columns of the text tokens (B, M), and (B, M) bool: False where a row has fewer."""
        return _columns_of(self.text)

    @cached_property
    def key(self) -> Tensor:
        """(B, H_kv, T, d) keys of the current sequence in the layer just run, RoPE included."""
        key = self.tap.key[:, :, -self.tap.length :].transpose(1, 2)
        return self._left(key).transpose(1, 2)

    @property
    def key_partners(self) -> Tensor | None:
        """(d,) the channel of a head that RoPE turns each channel of `key` with; None: d / 2 on."""
        return self.tap.partners

    def _left(self, x: Tensor) -> Tensor:
        """Of x (B, T, ...) of the layer that has run, the tokens that are left now."""
        return x if self.ran is None else gather_tokens(x, self.ran)

    def attention(
        self, rows: Literal["last", "prompt"] | Tensor = "last", ahead: bool = False
    ) -> Tensor:
        """Attention of chosen query rows to the visual tokens.

        Softmax in fp32 over all keys the row may see, then the visual columns.

        Args:
            rows: the last token of each row, all text behind the last image, or columns (B, R).
            ahead: False, in the layer that has just run; True, in the next one, from its own norm,
                projections and RoPE at the positions now in use.

        Returns:
            (B, H, R, N); R is 1 for "last", the longest prompt for "prompt" (short rows and
            padded columns hold zeros).
        """
        alive = None
        if isinstance(rows, Tensor):
            index = rows
        elif rows == "last":
            index = self.last_row[:, None]
        else:
            index, alive = _columns_of(self.prompt)
        visual, source = self.visual_index, self.ahead() if ahead else self.tap
        if self.ran is not None and not ahead:
            index, visual = self.ran.gather(1, index), self.ran.gather(1, visual)
        weights = source.attention(index)
        columns = (visual + weights.shape[-1] - source.length)[:, None, None, :]
        out = weights.gather(3, columns.expand(*weights.shape[:3], -1))
        if alive is not None:
            out = out.masked_fill(~alive[:, None, :, None], 0)  # rows of padding are NaN
        return out if self.valid is None else out * self.valid[:, None, None, :]

    @property
    def attention_input(self) -> Tensor:
        """(B, T, D) normed input of the attention of the layer just run (needs "sublayers")."""
        return self._left(self.tap.sublayers["attention"][0])

    @property
    def attention_output(self) -> Tensor:
        """(B, T, D) output of the attention of the layer just run, before the residual add."""
        return self._left(self.tap.sublayers["attention"][1])

    @property
    def mlp_input(self) -> Tensor:
        """(B, T, D) normed input of the MLP of the layer just run (needs "sublayers")."""
        return self._left(self.tap.sublayers["mlp"][0])

    @property
    def mlp_output(self) -> Tensor:
        """(B, T, D) output of the MLP of the layer just run, before the residual add."""
        return self._left(self.tap.sublayers["mlp"][1])


@dataclass
class CacheView:
    """One layer of the KV cache.

    Attributes:
        keys, values: (B, H_kv, P, d) of the P physical slots.
        visual: (B, P) bool; valid: (B, P) bool, None when no slot is padding.
        layer: 0-based; depth: number of layers; step: 0 after prefill, then decoded tokens so far.
        budget: visual slots that the method would keep in each row, (B,) int64.
        scratch: this method's named tensors (B, P, ...), kept on the cache layer; slots decoded
            since hold zeros.
        reaches_end: (B, P) bool, tokens that also entered the last LLM layer (in `on_cache` only).
        peers: this method's scratch on every layer (in `on_cache` only).
    """

    keys: Tensor
    values: Tensor
    visual: Tensor
    valid: Tensor | None
    layer: int
    depth: int
    step: int
    budget: Tensor
    tap: Any = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    reaches_end: Tensor | None = None
    peers: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def watched(self) -> Watched:
        """Of a packed layer, what is not packed yet: the last slots."""
        parts = {"keys": self.keys.transpose(1, 2), "values": self.values.transpose(1, 2)}
        first = self.visual.shape[1] - self.keys.shape[2]
        return parts, None if self.valid is None else self.valid[:, first:]

    @property
    def queries(self) -> int:
        """Query rows of this forward; they stand at the end of the slots."""
        return self.tap.query.shape[2]

    def attention(self, rows: Tensor) -> Tensor:
        """(B, H, R, P) attention in fp32 of this forward's query rows (B, R); `note_cache` only."""
        return self.tap.attention(rows)

    def attention_received(self, chunk: int = 256) -> Tensor:
        """(B, P) attention each slot gets from all query rows, mean over heads, summed over rows.

        Padding rows do not count. In `note_cache` only.
        """
        n = self.queries
        if self.tap.mask is None and self.valid is None:  # causal, every row and slot counts
            q, k = self.tap.query, self.tap.key
            return column_sums(q, k, scale=self.tap.scale, causal=True).mean(1)
        rows = torch.arange(n, device=self.keys.device).expand(self.keys.shape[0], -1)
        real = None if self.valid is None else self.valid[:, -n:]
        total: Any = 0.0
        for i in range(0, n, chunk):
            part = self.attention(rows[:, i : i + chunk]).mean(1)
            if real is not None:
                part = part.where(real[:, i : i + chunk, None], 0.0)
            total = total + part.sum(1)
        return total


def _columns_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the True entries of (B, T), ascending, (B, M); and (B, M) bool, which are real."""
    counts = mask.sum(1)
    m = int(counts.max())
    index = mask.long().argsort(dim=1, descending=True, stable=True)[:, :m]
    return index, torch.arange(m, device=mask.device) < counts[:, None]
