# SPDX-License-Identifier: Apache-2.0
"""Methods that remove visual tokens in more than one place, and how they share the budget."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar

from torch import Tensor

from ..budgets import relative_layers
from ..errors import UnsupportedError
from ..hyperparameters import (
    check_counts,
    check_layers,
    check_no_budget,
    check_range,
    check_shares,
    waive,
)
from ..method import Method
from ..views.decoder import DecoderView
from ..views.features import FeaturesView

RATIOS = (1.0, 0.9, 0.8, 0.7, 1.0)
MIDDLE = 15  # of 32: layers 16 to 31 run on fewer


@dataclass(frozen=True, kw_only=True)
class Staged(Method):
    """Shrinks the visual tokens after a few LLM layers, each time to a share of the original ones.

    Without a budget the shares are ``ratios``, or the published ones, of which int() tokens stay.
    With a budget of f n tokens they are f^a, with exponents a that give the published shares at the
    published f, rounded; the last stage leaves exactly the budget.

    Args:
        layers: 0-based layers of a 32-layer LLM after which tokens leave; others are scaled.
        ratios: share of the original tokens that each stage leaves; instead of a budget.
    """

    layers: tuple[int, ...]
    ratios: tuple[float, ...] | None = None

    published: ClassVar[tuple[float, ...]]
    """Shares when neither ratios nor a budget is given."""
    exponents: ClassVar[tuple[float, ...]]
    """Powers of the final share f; the last one is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.exponents)
        check_layers(self, "layers", "0-based layers of 32", of=32, count=stages)
        check_no_budget(self, "ratios")
        what = f"{stages} falling shares of the original tokens"
        check_shares(self, "ratios", what, count=stages, falling=True)

    def shares(self, n: int) -> tuple[int, ...]:
        """Tokens of an image with n that each stage leaves."""
        ratios = self.ratios
        if ratios is None and not self.budget_given:
            ratios = self.published
        if ratios is not None:  # a count such as 300 / 576 must survive the division
            return tuple(max(1, int(n * r + 1e-6)) for r in ratios)
        k = super().budget(n)
        return (*(max(k, round(n * (k / n) ** a)) for a in self.exponents[:-1]), k)

    def budget(self, n: int, grid: tuple[int, int] | None = None) -> int:
        return self.shares(n)[-1]

    def stage_layers(self, depth: int) -> tuple[int, ...]:
        """The 0-based layers of an LLM of ``depth`` after which tokens leave.

        Raises:
            UnsupportedError: the LLM has too few layers.
        """
        layers = relative_layers(self.layers, of=32, depth=depth)
        if layers[-1] > depth - 2:
            raise UnsupportedError(
                f"{self.name} prunes after {len(layers)} layers and needs at least "
                f"{len(layers) + 1}; the language model has {depth}; use fastv"
            )
        return layers

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return self.stage_layers(depth)

    def schedule(self, n: int, depth: int) -> list[int]:
        """Visual tokens that each LLM layer processes, of an image with n."""
        after = dict(zip(self.stage_layers(depth), self.shares(n), strict=True))
        counts = []
        for layer in range(depth):
            counts.append(n)
            n = after.get(layer, n)
        return counts

    def target(self, v: DecoderView) -> int | Tensor | None:
        """Tokens each row keeps here, as `DecoderView.budget`; None where there is nothing to do.

        That is between the stages, and when no row has more.
        """
        layers = self.stage_layers(v.depth)
        if v.layer not in layers:
            return None
        stage = layers.index(v.layer)

        def share(n: int) -> int:
            return self.shares(n)[stage]

        return None if v.within(share) else v.per_row(share)


def entering(k: int, n: int, share: float) -> int:
    """Tokens of n that enter the LLM when it later keeps ``share`` of them, and k at the end."""
    return max(k, min(n, round(k / share)))


@dataclass(frozen=True, kw_only=True)
class TwoPlaces(Method):
    """Selects in front of the LLM, and again after half of its layers; the budget is the final one.

    Args:
        llm_share: fraction of the tokens that entered the LLM which its middle layer keeps; 1 for
            no selection inside the LLM.
    """

    llm_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        what = "the fraction of its visual tokens that the LLM keeps, 1 for no selection inside it"
        check_range(self, "llm_share", what, "(]")
        if self.llm_share == 1:
            waive(self, "ran")

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return relative_layers((MIDDLE,), of=32, depth=depth)

    def entering(self, v: FeaturesView) -> int:
        """Tokens that each image of the view keeps in front of the LLM."""
        return entering(v.budget(self), v.total, self.llm_share)


@dataclass(frozen=True, kw_only=True)
class StagedBlocks(Method):
    """Drops patches behind a few encoder blocks, each time alike ones (S) and then the least (I).

    Args:
        layers: encoder blocks, from 1, behind which patches are pruned.
        of: blocks of the encoder that ``layers`` means; others prune at the same relative depths.
        ratios: share of the patches that each I-stage keeps, one for each of ``layers``. Without a
            budget they are used as they are; with one they give the shape of the schedule.
        similar: patches that each S-stage drops: a count, or a fraction of all patches.
        iterations: votes of each I-stage.
    """

    layers: tuple[int, ...] = (1, 3, 6, 9, 11)
    of: int = 12
    ratios: tuple[float, ...] | None = None
    similar: int | float = 10 / 196
    iterations: tuple[int, ...] = (30, 5, 5, 1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "layers", "blocks", first=1)
        if self.of < self.layers[-1]:
            raise ValueError(f"layers reach to {self.layers[-1]}, behind the {self.of} blocks (of)")
        count = len(self.layers)
        check_shares(self, "ratios", f"shares, one for each of {count} layers", count)
        check_counts(self, "iterations", f"votes, one for each of {count} layers", count)
        whole = isinstance(self.similar, int) and not isinstance(self.similar, bool)
        if self.similar < 0 or not (whole or self.similar < 1):
            raise ValueError(
                f"similar is a count of patches or a fraction of them below 1; got {self.similar!r}"
            )
        if not self.similar and all(r == 1 for r in self.shape):
            raise ValueError("nothing would be pruned: ratios of 1 and similar=0; lower a ratio")

    @property
    def has_budget(self) -> bool:
        return self.ratios is None or self.budget_given

    @property
    def shape(self) -> tuple[float, ...]:
        """The shares kept by the I-stages, before any stretching."""
        if self.ratios is not None:
            return self.ratios
        return RATIOS if len(self.layers) == len(RATIOS) else (0.8,) * len(self.layers)

    def counts(self, n: int) -> list[tuple[int, int]]:
        """Patches of n left after the S- and the I-stage of each of ``layers``."""
        each = self.similar if isinstance(self.similar, int) else max(1, round(self.similar * n))
        left, shape = n, []
        for ratio in self.shape:
            after = left - min(each, left // 2)
            left = max(1, round(after * ratio))
            shape.append((after, left))
        k = self.budget(n)
        if not self.has_budget or left == n:
            return shape
        steepness = log(k / n) / log(left / n)

        def stretched(count: int) -> int:
            return max(k, round(n * (count / n) ** steepness))

        return [(stretched(after), stretched(left)) for after, left in shape]

    def schedule(self, n: int, depth: int) -> dict[int, tuple[int, int, int]]:
        """By 0-based block of ``depth``: patches to drop in S, patches left at the end, votes of I.

        In a shallow encoder several of ``layers`` may fall on one block, which does their work.
        """
        plan: dict[int, tuple[int, int, int]] = {}
        now = n
        for layer, (after, left), votes in zip(
            self.layers, self.counts(n), self.iterations, strict=True
        ):
            block = min(max(round(layer * depth / self.of), 1), depth) - 1
            dropped, _, most = plan.get(block, (0, now, 0))
            plan[block] = dropped + now - after, left, max(votes, most)
            now = left
        if self.has_budget:  # what rounding may have left over
            plan[block] = plan[block][0], self.budget(n), plan[block][2]
        return plan
