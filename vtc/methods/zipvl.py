# SPDX-License-Identifier: Apache-2.0
"""ZipVL: in every LLM layer, only the tokens that carry the attention take part in it.

He et al., ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification,
arXiv 2410.08584. In front of each layer, from a set P of probe rows (the 64 most recent and 64
random positions), with a_j the attention that token j gets from them there, mean over heads:

    p   = smallest number such that the p largest a_j sum to tau |P|
    a~_j = a_j / |{c in P : c >= j}|                          how often j could be seen at all
    T   = the p tokens with the largest a~_j

Tokens outside T bypass the attention on the residual and keep their MLP (``kv="drop"``, the
later version: their keys and values are not held in this layer). ``kv="mixed"`` is the first
version's cache: attention of the prompt is complete, every key and value is held, those of T at 4
bits and the others at 2.

With keep_ratio or keep_tokens every layer takes the same number of visual tokens by a~, else tau
decides, layer by layer and row by row. Far fewer tokens enter attention, but all of them the MLPs:
expect gains in long prompts and in memory. Document and chart questions lose most (ChartQA 66.2 to
58.2 on LLaVA-NeXT-13B).

Departures: text always takes part, and its attention counts towards tau; only visual tokens are
left out, at least one stays. The budget is the share tau of all attention of the probe rows (tau n
in the paper, equal when all rows are probes), counted in a, ranked by a~. Random probe rows are a
fixed pseudo-random choice for each layer, so results repeat and rows of a batch do not couple. In
"mixed": 4 and 2 bits with groups of 32 tokens, one scale and zero point a channel; T always holds
the first and the last token and is filled up to whole groups; rows decoded since count as probes;
tokens are packed once, when 100 have been decoded, where the paper evaluates all of them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..cache.codecs import Affine, Packing, check_group
from ..hyperparameters import check_choice, check_count, check_no_budget, check_range, waive
from ..method import Method, StageName
from ..reduction import Reduction, ranks
from ..registry import register
from ..views.cache import CacheView
from ..views.decoder import DecoderView
from ._common import noise

STREAM = 100
TAU = 0.975


def probe_rows(
    real: Tensor, recent: int = 64, random: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The last tokens of each row and a fixed pseudo-random choice of the others.

    Args:
        real: (B, T) bool, False on padding.

    Returns:
        Columns (B, R), ascending, and (B, R) bool, False where a row has fewer tokens.
    """
    place = real.long().cumsum(1) - 1
    last = place >= real.sum(1, keepdim=True) - recent
    order = noise(place, seed).where(~last, 1 << 33).where(real, -1)
    order, index = order.sort(dim=1, descending=True, stable=True)
    index = index[:, : recent + random].sort(dim=1).values
    return index, real.gather(1, index)


def received(attention: Tensor, alive: Tensor) -> Tensor:
    """(B, N) mean over heads of attention (B, H, R, N), summed over the rows alive (B, R)."""
    return attention.mean(1).masked_fill(~alive.unsqueeze(-1), 0).sum(1)  # others may be NaN


def token_budget(a: Tensor, tau: float, total: Tensor, other: Tensor) -> Tensor:
    """Smallest p (B,) >= 1 such that ``other`` and the p largest of a (B, N) reach tau * total."""
    sums = a.sort(dim=1, descending=True).values.cumsum(1) + other[:, None]
    return ((sums < tau * total[:, None]).sum(1) + 1).clamp(max=a.shape[1])


@register
@dataclass(frozen=True, kw_only=True)
class ZipVL(Method):
    """Let only the attended visual tokens into the attention of each layer.

    Args:
        tau: share of the attention that the chosen tokens hold, 0.975 unless given; instead of a
            budget.
        recent, random: probe rows.
        kv: "drop" holds keys and values of the chosen tokens, "mixed" all of them at 4 or 2 bits.
        group: with "mixed", tokens that share statistics, a multiple of 8.
        seed: another seed, other random probe rows.
    """

    tau: float | None = None
    recent: int = 64
    random: int = 64
    kv: Literal["drop", "mixed"] = "drop"
    group: int = 32
    seed: int = 0

    name = "zipvl"
    summary = "Lets only the attended tokens into each layer's attention (ZipVL, ICCV 2025)"
    needs = frozenset({"ahead"})
    default_ratio = 1.0
    bypass = "attention"
    packs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "tau", "a share of the attention", "(]", optional=True)
        check_no_budget(self, "tau")
        check_count(self, "recent", "the number of last rows", least=1)
        check_count(self, "random", "a count of rows", least=0)
        check_choice(self, "kv", ("drop", "mixed"))
        check_group(self.group, 0)
        if self.kv == "mixed":
            if self.budget_given:
                raise ValueError('kv="mixed" holds every token: set tau, not a number of tokens')
            waive(self, "ahead")

    @property
    def share(self) -> float:
        """tau, as given or as published."""
        return TAU if self.tau is None else self.tau

    @property
    def while_decoding(self) -> bool:
        return self.kv == "mixed"

    @property
    def compiles(self) -> bool:
        return self.budget_given and self.kv == "drop"

    @property
    def has_budget(self) -> bool:
        return self.budget_given

    @property
    def stages(self) -> frozenset[StageName]:
        return frozenset({"bypass" if self.kv == "drop" else "cache"})

    def on_bypass(self, v: DecoderView) -> Reduction | None:
        if self.has_budget and v.within_budget(self):
            return None
        rows, alive = probe_rows(
            v.text | v.visual, self.recent, self.random, self.seed + v.layer + 1
        )
        a = received(v.attention(rows, ahead=True), alive)
        visible = (rows[:, None] >= v.visual_index.unsqueeze(-1)) & alive[:, None]
        score = a / visible.sum(-1).clamp(min=1)
        if self.has_budget:
            return Reduction.from_scores(score, v.budget(self), v.valid)
        total = alive.sum(1).float()
        p = token_budget(a, self.share, total, total - a.sum(1))
        if v.valid is not None:
            p = torch.minimum(p, v.valid.sum(1))
        return Reduction.from_scores(score, p, v.valid)

    def note_cache(self, v: CacheView) -> None:
        slots, n = v.visual.shape[1], v.queries
        real = torch.ones_like(v.visual) if v.valid is None else v.valid
        rows, alive = probe_rows(real[:, -n:], self.recent, self.random, self.seed + v.layer)
        a = received(v.attention(rows), alive)
        column = torch.arange(slots, device=rows.device)[:, None]
        visible = ((rows[:, None] + slots - n >= column) & alive[:, None]).sum(-1)
        probes = alive.sum(1, keepdim=True).expand_as(visible)
        if "a" in v.scratch:
            a, visible = a + v.scratch["a"], visible + v.scratch["visible"]
            probes = probes + v.scratch["probes"].amax(1, keepdim=True)
        v.scratch["a"], v.scratch["visible"], v.scratch["probes"] = a, visible, probes

    def on_cache(self, v: CacheView) -> Packing | None:
        due = self.group if v.step == 0 else max(self.group, STREAM)
        if v.keys.shape[2] < due:
            return None
        a, total = v.scratch["a"], v.scratch["probes"].amax(1).float()
        real = torch.ones_like(v.visual) if v.valid is None else v.valid
        p = token_budget(a, self.share, total, torch.zeros_like(total))
        place = real.long().cumsum(1) - 1
        ends = (place == 0) | (place == real.sum(1, keepdim=True) - 1)
        rank = (a / v.scratch["visible"].clamp(min=1)).masked_fill(ends, torch.inf)
        rank = rank.masked_fill(~real, -torch.inf)
        return Packing(
            keys=Affine(2),
            values=Affine(2),
            window=0,
            due=due,
            group=self.group,
            keys_high=Affine(4),
            values_high=Affine(4),
            important=(ranks(rank) < p[:, None]) & real,
            rank=rank,
        )
