# SPDX-License-Identifier: Apache-2.0
"""`Reduction`: which tokens survive, and where did the others go?"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .kernels import merge_tokens


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, ...) at index (B, K): a tensor (B, K, ...)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, index.to(x.device)]


def top_k(scores: Tensor, k: int) -> Tensor:
    """Ascending indices (B, k) of the k highest of scores (B, N).

    Ranked in fp32; ties go to the lower index, whatever the device.
    """
    order = scores.float().argsort(dim=1, descending=True, stable=True)
    return order[:, :k].sort(dim=1).values


def ranks(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Rank (B, N) int64 of each of scores (B, N): 0 is the highest, ties to the lower index.

    Args:
        scores: (B, N), ranked in fp32.
        valid: (B, N) bool, False on entries that are no tokens: behind all others in any case.
    """
    scores = scores.float()
    if valid is not None:
        scores = scores.clamp(min=torch.finfo(torch.float32).min).masked_fill(~valid, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def marked(index: Tensor, n: int) -> Tensor:
    """(B, n) bool, True at index (B, K)."""
    mask = torch.zeros(len(index), n, dtype=torch.bool, device=index.device)
    return mask.scatter(1, index, True)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


@dataclass(frozen=True)
class Reduction:
    """A map from N source tokens to K surviving slots, for each row of a batch.

    Attributes:
        keep: (B, K) int64, the source index that each slot stands at, ascending over valid slots.
        group: (B, N) int64, the slot each source token was folded into; -1 where it was dropped.
        valid: (B, K) bool, False on padding slots of a ragged batch; None when every row keeps K.
        scores: (B, N) what the tokens were ranked by, for pictures; None where nothing was.
    """

    keep: Tensor
    group: Tensor
    valid: Tensor | None = None
    scores: Tensor | None = None

    # ---- constructors -------------------------------------------------------------------------

    @classmethod
    def identity(cls, batch: int, n: int, device: torch.device | str | None = None) -> Reduction:
        """Every token survives."""
        index = torch.arange(n, device=device).expand(batch, n)
        return cls(index, index)

    @classmethod
    def from_keep(cls, keep: Tensor, n: int, valid: Tensor | None = None) -> Reduction:
        """Drop all of the n tokens but those at keep (B, K), ascending."""
        slots = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        group = keep.new_full((keep.shape[0], n + 1), -1)
        target = keep if valid is None else keep.where(valid, n)  # column n takes the padding slots
        group = group.scatter(1, target, slots)[:, :n]
        return cls(keep, group, valid)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Reduction:
        """Drop all but the True tokens of mask (B, N). Rows may keep different numbers."""
        counts = mask.sum(1)
        k = int(counts.max()) if mask.numel() else 0
        # True entries first, in source order, then whatever fills a short row.
        keep = mask.long().argsort(dim=1, descending=True, stable=True)[:, :k]
        valid = torch.arange(k, device=mask.device) < counts[:, None]
        return cls.from_keep(keep, mask.shape[1], None if bool(valid.all()) else valid)

    @classmethod
    def from_scores(cls, scores: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Reduction:
        """Drop all but the k highest of scores (B, N), ties to the lower index.

        Args:
            scores: (B, N), ranked in fp32.
            k: one count for all rows, or a tensor (B,) of counts.
            valid: (B, N) bool, False on entries that are not tokens and must never survive.

        NaN would rank first: the engine looks at the scores, and raises `NotFiniteError`.

        Raises:
            ValueError: a negative count.
        """
        if isinstance(k, int) and k < 0:
            raise ValueError(f"k counts tokens that survive; got {k}")
        if isinstance(k, int) and valid is None:
            return cls.from_keep(top_k(scores, k), scores.shape[1]).ranked(scores)
        valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
        k = torch.as_tensor(k, device=scores.device).expand(scores.shape[0])
        return cls.from_mask((ranks(scores, valid) < k[:, None]) & valid).ranked(scores)

    @classmethod
    def from_merge(cls, target: Tensor, k: int | None = None) -> Reduction:
        """Merge: each token folds into the token at target (B, N); -1 drops it.

        A token with ``target[i] == i`` survives and stands for its group. Every target must itself
        survive.

        Args:
            target: (B, N) int64.
            k: the number of survivors of every row; when None they are counted, which waits for the
                device, and rows may differ.
        """
        batch, n = target.shape
        index = torch.arange(n, device=target.device).expand(batch, n)
        own = target == index
        valid = None
        if k is None:
            counts = own.sum(1)
            k = int(counts.max()) if batch else 0
            valid = torch.arange(k, device=target.device) < counts[:, None]
            valid = None if bool(valid.all()) else valid
        slot = own.cumsum(1) - 1
        keep = target.new_zeros(batch, k + 1)  # column k takes the tokens that do not survive
        keep = keep.scatter(1, slot.where(own, k), index)[:, :k]
        group = slot.gather(1, target.clamp(min=0)).where(target >= 0, -1)
        return cls(keep, group, valid)

    def ranked(self, scores: Tensor) -> Reduction:
        """The same reduction, with the scores (B, N) that tokens were ranked by, for pictures.

        Not if they are bool: a choice that was made already is no ranking.
        """
        if scores.dtype == torch.bool:
            return self
        return Reduction(self.keep, self.group, self.valid, scores.detach())

    # ---- facts --------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.keep.shape[0]

    @property
    def source_count(self) -> int:
        """N, the number of tokens before."""
        return self.group.shape[1]

    @property
    def count(self) -> int:
        """K, the number of slots after, padding slots included."""
        return self.keep.shape[1]

    @property
    def counts(self) -> Tensor:
        """(B,) survivors of each row."""
        if self.valid is None:
            return torch.full((self.batch,), self.count, device=self.keep.device)
        return self.valid.sum(1)

    # ---- algebra ------------------------------------------------------------------------------

    def then(self, second: Reduction) -> Reduction:
        """This reduction followed by one of its K slots: one map from the N source tokens."""
        if second.source_count != self.count:
            raise ValueError(
                f"cannot compose: the first reduction leaves {self.count} tokens, the second takes "
                f"{second.source_count}"
            )
        keep = self.keep.gather(1, second.keep)
        dropped = second.group.new_full((self.batch, 1), -1)
        onward = torch.cat([second.group, dropped], 1)
        group = onward.gather(1, self.group.where(self.group >= 0, self.count))
        valid = second.valid
        if self.valid is not None:
            inherited = self.valid.gather(1, second.keep)
            valid = inherited if valid is None else valid & inherited
        return Reduction(keep, group, valid)

    def select(self, x: Tensor) -> Tensor:
        """Survivors of an aligned tensor: (B, N, ...) -> (B, K, ...)."""
        return gather_tokens(x, self.keep)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of every group: (B, N, ...) -> (B, K, ...); padding slots hold zeros.

        Half precision is accumulated in fp32.
        """
        batch, n = x.shape[:2]
        rows = torch.arange(batch, device=x.device)[:, None] * (self.count + 1)
        group = self.group.to(x.device)
        slot = rows + group.where(group >= 0, self.count)  # the last slot takes what is dropped
        flat = x.reshape(batch * n, prod(x.shape[2:])).to(_at_least_fp32(x.dtype))
        out = flat.new_zeros(batch * (self.count + 1), flat.shape[1])
        out = out.index_add_(0, slot.flatten(), flat).to(x.dtype)
        return out.reshape(batch, self.count + 1, *x.shape[2:])[:, : self.count]

    def merge(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Size-weighted mean of every group.

        Args:
            x: (B, N, C).
            size: (B, N) number of patches behind each token; ones when None.

        Returns:
            The merged tokens (B, K, C), accumulated in fp32 or better and returned in the dtype of
            x, and their sizes (B, K) in fp32 or better; padding slots hold zeros.
        """
        return merge_tokens.merge(x, size, self.group.to(x.device), self.count)

    def expand(self, x: Tensor) -> Tensor:
        """The way back: every source token gets the value of its slot, (B, K, C) -> (B, N, C).

        Dropped tokens get zeros.
        """
        if self.count == 0:
            return x.new_zeros(self.batch, self.source_count, *x.shape[2:])
        rows = gather_tokens(x, self.group.clamp(min=0))
        dropped = (self.group < 0).to(x.device)
        return rows.masked_fill_(dropped.reshape(*dropped.shape, *[1] * (x.dim() - 2)), 0)

    def row(self, i: int) -> Reduction:
        """Row i alone, on the CPU."""
        parts = (self.keep, self.group, self.valid, self.scores)
        return Reduction(*(None if x is None else x[i : i + 1].cpu() for x in parts))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Reduction:
        """The same reduction on another device."""
        parts = (self.keep, self.group, self.valid, self.scores)
        return Reduction(*(None if x is None else x.to(device) for x in parts))  # type: ignore[arg-type]
