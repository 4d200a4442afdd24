# SPDX-License-Identifier: Apache-2.0
"""Functions of several methods: scores, pseudo-random numbers, merge targets and clusters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..hyperparameters import check_choice, waive
from ..kernels import merge_tokens
from ..kernels.similarity_reduce import best_match
from ..kernels.similarity_reduce.reference import BLOCK
from ..reduction import gather_tokens, ranks
from ..views.decoder import DecoderView
from ..views.features import FeaturesView

Saliency = Literal["cls", "received"]
NEIGHBOURS = 5  # whose distance is the density of `density_peaks`


def unit(x: Tensor) -> Tensor:
    """x (..., C) in fp32, scaled to unit length."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)


# ---- scores ------------------------------------------------------------------------------------


def check_saliency(method: Any, allowed: Sequence[str] = ("cls", "received")) -> None:
    """Refuse an unknown ``saliency``; the substitutes for [CLS] need no class token."""
    check_choice(method, "saliency", allowed)
    if method.saliency != "cls":
        waive(method, "cls")


def saliency_of(v: FeaturesView, layer: int, how: Saliency | Literal["cosine"]) -> Tensor:
    """(B, N) attention of [CLS] in an encoder block, mean over heads, or a substitute for it.

    Args:
        how: "cls"; "received", the mean attention that a patch receives; or "cosine", how little a
            patch is like the mean feature.
    """
    if how == "cls":
        return v.cls_attention(layer).mean(1)
    if how == "received":
        return v.attention_received(layer)
    x = v.features.float()
    return -(unit(x) * unit(x.mean(1, keepdim=True))).sum(-1)


def attended(v: DecoderView, rows: Literal["last", "prompt"], ahead: bool = False) -> Tensor:
    """(B, N) attention to visual tokens, mean over heads, of the last token or summed over a text.

    The text is what stands behind the last image. Its sum ranks tokens like its mean: they differ
    by one factor for each row of the batch.
    """
    return v.attention(rows, ahead=ahead).mean(1).sum(1)


def noise(index: Tensor, seed: int) -> Tensor:
    """Pseudo-random integers in [0, 2^32) by token index (int64) and seed."""
    return hash32(index + hash32(torch.full_like(index, seed & 0xFFFFFFFF) + 1))


def hash32(x: Tensor) -> Tensor:
    """Wellons' lowbias32 of the lower 32 bits of an int64 tensor."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def unlike(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """(B, N) minus the cosine of each of x (B, N, C) to the mean of its group (B, N)."""
    x = x.float()
    mean, _ = merge_tokens.merge(x, None, group, groups)
    return -(unit(x) * unit(gather_tokens(mean, group))).sum(-1)


def row_blocks(x: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Slices of the rows, N or as many as given, of matrices of N columns for each of x (B, N, ..).

    They have at most `BLOCK` entries, so that few are held at once.
    """
    batch, n = x.shape[:2]
    rows, step = n if rows is None else rows, max(1, BLOCK // (batch * n))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


# ---- choices -----------------------------------------------------------------------------------


def places(group: Tensor) -> Tensor:
    """(B, N) place of each token among those of its group (B, N), in their order; 0 the first."""
    order = group.argsort(dim=1, stable=True)
    ascending = group.gather(1, order)
    first = torch.searchsorted(ascending, ascending)  # where each one's group begins
    place = torch.arange(order.shape[1], device=order.device) - first
    return torch.empty_like(place).scatter_(1, order, place)


def best_of_each(
    scores: Tensor, group: Tensor, quota: Tensor, valid: Tensor | None = None
) -> Tensor:
    """(B, N) bool, the ``quota[b, g]`` tokens with the highest scores of group g in row b.

    Args:
        scores: (B, N), ties to the first; group: (B, N) numbers below P; quota: (B, P).
        valid: (B, N) bool, False on entries that are no tokens.
    """
    if valid is not None:
        group = group.where(valid, quota.shape[1])  # behind all groups, and none of them wanted
        quota = torch.nn.functional.pad(quota, (0, 1))
    order = scores.float().argsort(dim=1, descending=True, stable=True)
    by_score = group.gather(1, order)
    wanted = places(by_score) < quota.gather(1, by_score)
    return torch.zeros_like(wanted).scatter(1, order, wanted)


def into_nearest(x: Tensor, targets: Tensor) -> Tensor:
    """(B, N) where tokens x (B, N, C) fold: the nearest of targets (B, K) by cosine."""
    _, nearest = best_match(x, gather_tokens(x, targets))
    return targets.gather(1, nearest).scatter(1, targets, targets)


def into_chosen(x: Tensor, chosen: Tensor) -> Tensor:
    """(B, N) where tokens x (B, N, C) fold: the nearest of those chosen (B, N) by cosine."""
    index = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
    _, nearest = best_match(x, x, b_mask=chosen)
    return index.where(chosen, nearest)


def density_peaks(x: Tensor, clusters: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """The centre (B, M) that each token of x (B, M, C) belongs to; a centre belongs to itself.

    Args:
        clusters: number of centres, one for all rows or (B,).
        valid: (B, M) bool, False on entries that are no tokens: no centre, no neighbour.
    """
    x = x.float()
    batch, m, channels = x.shape
    alive = torch.ones(batch, m, dtype=torch.bool, device=x.device) if valid is None else valid
    x = x.masked_fill(~alive[..., None], 0)
    x = x - x.sum(1, keepdim=True) / alive.sum(1).clamp(min=1)[:, None, None]
    square = (x * x).sum(2)
    gram = x @ x.transpose(1, 2)
    gram = gram + gram.transpose(1, 2)  # a pair must tie exactly, not up to rounding
    d2 = (square[:, :, None] + square[:, None, :] - gram).clamp(min=0)
    d2 = (d2 / channels).masked_fill(~alive[:, None, :], torch.inf)
    d2.diagonal(dim1=1, dim2=2).fill_(torch.inf)

    near = d2.topk(min(NEIGHBOURS, m), dim=2, largest=False).values
    there = near.isfinite()
    mean = near.where(there, 0).sum(2) / there.sum(2).clamp(min=1)
    mean = mean.masked_fill(~alive, torch.inf)
    # Densities relative to the densest token, which keeps the exponential away from zero.
    density = (mean.amin(1, keepdim=True) - mean).exp()

    order = ranks(density, alive)  # equal densities: the first is the denser
    denser = order[:, None, :] < order[:, :, None]
    delta = d2.masked_fill(~denser, torch.inf).amin(2)
    farthest = d2.masked_fill(~d2.isfinite(), 0).amax((1, 2))
    delta = delta.where(delta.isfinite(), farthest[:, None]).sqrt()

    count = torch.as_tensor(clusters, device=x.device).expand(batch)
    centre = (ranks(density * delta, alive) < count[:, None]) & alive
    nearest = d2.masked_fill(~centre[:, None, :], torch.inf).argmin(2)
    return nearest.where(~centre, torch.arange(m, device=x.device))


def greedy_order(
    x: Tensor, k: int, start: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """The k tokens of x (B, N, C) in the order they are chosen, (B, k) int64; ties to the first.

    Args:
        start: (B, N) bool, tokens that are chosen already, at least one in each row; they are not
            among the k, which keep away from them.
        valid: (B, N) bool, False on entries that are no tokens.
    """
    x = unit(x)
    nearest = torch.full_like(x[..., 0], torch.inf)
    if valid is not None:
        nearest = nearest.masked_fill(~valid, -torch.inf)
    others = valid if start is None else start
    most, _ = best_match(x, x, normalize=False, exclude_diag=True, b_mask=others)
    first = torch.minimum(1 - most, nearest)
    if start is not None:
        nearest = first = first.masked_fill(start, -torch.inf)
    chosen = [first.argmax(1, keepdim=True)]
    for _ in range(k - 1):  # one row of distances at a time: all of them would be N x N
        distance = 1 - (x @ gather_tokens(x, chosen[-1]).mT)[..., 0]
        nearest = torch.minimum(nearest, distance).scatter(1, chosen[-1], -torch.inf)
        chosen.append(nearest.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


def outliers(scores: Tensor) -> Tensor:
    """(B, N) bool: scores above Q3 + 1.5 (Q3 - Q1) of their row."""
    scores = scores.float()
    q1, q3 = torch.quantile(scores, scores.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
    return scores > q3 + 1.5 * (q3 - q1)
