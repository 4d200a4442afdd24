# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def bootstrap(
    scores: np.ndarray, groups: Sequence[Any], seed: int, draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean score, drawing images rather than questions.

    Questions about one image stand and fall together, so they are drawn together.
    """
    names = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    index = np.asarray([names[g] for g in groups])
    total, count = np.bincount(index, weights=scores), np.bincount(index)
    rng, images = np.random.default_rng(seed), len(total)
    parts, part = [], max(1, 1_000_000 // images)  # not all draws in memory at once
    for start in range(0, draws, part):
        pick = rng.integers(0, images, (min(part, draws - start), images))
        parts.append(total[pick].sum(1) / count[pick].sum(1))
    means = np.concatenate(parts)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
