# SPDX-License-Identifier: Apache-2.0
"""Confidence bounds that hold for few samples and for any distribution."""

from __future__ import annotations

from math import exp, lgamma, log, log1p

import numpy as np

LEVEL = 0.95
DRAWS = 10_000


def mean_bound(values: np.ndarray, most: float, seed: int = 0, level: float = LEVEL) -> float:
    """One-sided upper confidence bound of the mean of a variable in [0, most].

    Gaffke's (2005): the quantile, over Dirichlet(1, ..., 1) weights, of the weighted mean of the
    values and one more at the upper end, a Bayesian bootstrap that expects the worst of the next
    prompt. It needs no large sample and no distribution, and of zeros and ones it is the bound of
    Clopper & Pearson; in general its level rests on trials (Learned-Miller & Thomas 2019), not on a
    proof. A plain bootstrap knows nothing of what too few prompts show: its bound of 64 held in
    62 % of the trials, not in 95 %, where 3 % of them had nearly all the divergence.
    """
    points = np.append(values, most)
    rng = np.random.default_rng(seed)
    draws = (rng.standard_exponential(len(points)) for _ in range(DRAWS))
    return float(np.quantile([weights @ points / weights.sum() for weights in draws], level))


def share_bound(count: int, of: int, level: float = LEVEL) -> float:
    """One-sided upper confidence bound of a probability after ``count`` of ``of`` cases.

    The p at which so few or fewer cases have a chance of 1 - level (Clopper & Pearson 1934).
    """
    if count >= of:
        return 1.0
    ways = [lgamma(of + 1) - lgamma(i + 1) - lgamma(of - i + 1) for i in range(count + 1)]
    low, high = count / of, 1.0
    while high - low > 1e-9:
        p = (low + high) / 2
        chance = sum(exp(w + i * log(p) + (of - i) * log1p(-p)) for i, w in enumerate(ways))
        low, high = (p, high) if chance > 1 - level else (low, p)
    return high
