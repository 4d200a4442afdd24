# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: drop visual tokens in stages, more of them the deeper the LLM layer.

Xing et al., PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
Redundancy Reduction, CVPR 2025, arXiv 2410.17247. After LLM layers 8, 16 and 24 (of 32, from 1):

    score_j = mean over heads of A[h, last, j] in the *next* layer, from its own norm, W_q and W_k
    the best int(n r) tokens stay, r = .5, .25, .125 of the original n; positions are renumbered

Departures: position ids are kept by default; ``positions="compact"`` renumbers as published and
`paper` asks for it. The ranking query is the last token of the prompt, template included. A budget
f other than .125 becomes f^(1/3), f^(2/3), f of the tokens; other depths prune at the same relative
depth. All images of a row are one pool, with the sum of their budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..reduction import Reduction
from ..registry import register
from ..views.decoder import DecoderView
from ._common import attended
from ._stages import Staged


@register
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Staged):
    """Keep what the last prompt token attends to, half of it after each quarter of the LLM."""

    layers: tuple[int, ...] = (7, 15, 23)

    name = "pyramiddrop"
    summary = (
        "Halves what the last prompt token attends to least, at three depths of the LLM "
        "(PyramidDrop, CVPR 2025)"
    )
    needs = frozenset({"ahead"})
    default_ratio = 0.125
    published = (0.5, 0.25, 0.125)
    exponents = (1 / 3, 2 / 3, 1.0)
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", 72): {"ratios": published, "positions": "compact"},
        ("llava-next", 360): {"ratios": published, "positions": "compact"},
    }

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        k = self.target(v)
        if k is None:
            return None
        return Reduction.from_scores(attended(v, "last", ahead=True), k, v.valid)
