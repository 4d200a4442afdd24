# SPDX-License-Identifier: Apache-2.0
"""Budgets: layers and counts in proportion, and what is asked for a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class HasBudget(Protocol):
    """A method as a view asks it for its budget."""

    def budget(self, n: int, grid: tuple[int, int] | None = None) -> int:
        """Tokens to keep of the n visual tokens of one image."""


def apportion(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """``total`` divided in proportion to the weights, in whole numbers, none above its cap.

    Exactly ``total`` in sum, or all caps where they hold less. By largest remainder, ties to the
    first; what a cap holds back goes to the others.
    """
    shares = [0] * len(weights)
    open_ = [i for i, cap in enumerate(caps) if cap > 0]
    total = min(total, sum(caps))
    while open_:
        left = total - sum(shares)
        if sum(weights[i] for i in open_) <= 0:
            weights = [1] * len(weights)
        whole = sum(weights[i] for i in open_)
        full = {i for i in open_ if left * weights[i] >= caps[i] * whole}
        if not full:
            parts = {i: divmod(left * weights[i], whole) for i in open_}
            for i, (count, _) in parts.items():
                shares[i] = int(count)
            behind = sorted(open_, key=lambda i: -parts[i][1])
            for i in behind[: total - sum(shares)]:
                shares[i] += 1
            break
        for i in full:
            shares[i] = caps[i]
        open_ = [i for i in open_ if i not in full]
    return shares


def relative_layers(layers: Iterable[int], of: int, depth: int) -> tuple[int, ...]:
    """The 0-based layers of a decoder of ``depth`` that stand where ``layers`` do in one of ``of``.

    Behind layer 6 of 32 seven layers have run, as behind layer 1 two of 8. Ascending and distinct;
    the last layer is never among them, as long as there is room.
    """
    out: list[int] = []
    chosen = list(layers)
    for i, layer in enumerate(chosen):
        wanted = int((layer + 1) * depth / of + 0.5) - 1
        last = depth - 2 - (len(chosen) - 1 - i)
        out.append(max(min(wanted, last), out[-1] + 1 if out else 0))
    return tuple(out)


def geometric_counts(n: int, k: int, steps: int, floor: float = 0.5) -> list[int]:
    """Token counts after each of ``steps`` layers, from n to exactly k by a near-constant ratio.

    Args:
        floor: the smallest fraction of its input that one step may keep.

    Raises:
        ValueError: k cannot be reached without a step below the floor.
    """
    counts, current = [], n
    for step in range(steps):
        left = steps - step
        target = k if left == 1 else round(current * (k / current) ** (1 / left))
        least = -int(-current * floor // 1)  # ceiling: what one step can leave
        if left == 1 and target < least:
            raise ValueError(f"{n} -> {k} tokens needs a layer that keeps less than {floor:.0%}")
        current = max(target, least, k)
        counts.append(current)
    return counts
