# SPDX-License-Identifier: Apache-2.0
"""Naive density peaks for methods in the LLM."""

from __future__ import annotations

import math


def naive_peaks(x, clusters, k=5):
    """Density peaks, one token at a time."""
    n, c = x.shape
    d2 = [[((x[i] - x[j]) ** 2).sum().item() / c for j in range(n)] for i in range(n)]
    near = [sorted(d2[i][j] for j in range(n) if j != i)[:k] for i in range(n)]
    density = [math.exp(-sum(d) / max(1, len(d))) for d in near]
    delta = []
    for i in range(n):
        above = [math.sqrt(d2[i][j]) for j in range(n) if (density[j], -j) > (density[i], -i)]
        delta.append(min(above) if above else math.sqrt(max(map(max, d2))))
    centres = sorted(sorted(range(n), key=lambda i: -density[i] * delta[i])[:clusters])
    return [i if i in centres else min(centres, key=lambda j: d2[i][j]) for i in range(n)]
