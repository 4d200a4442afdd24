# SPDX-License-Identifier: Apache-2.0
"""DIPrune: what the text attends to in LLM layer 10, and what rises on the way there.

DIPrune, 2026. With R_l(j) the rank (0 is best) of visual token j by the mean text-to-visual
attention in layer l, l = 10 of 32 (from 1), and n the visual tokens:

    S_align = 1 - R_l / n
    S_evol  = (clamp(dR, -M, M) / M + 1) / 2,   dR = R_(l - delta) - R_l
    score   = .6 S_align + .4 S_evol

Departures: delta and M stand only in an appendix that we have not seen; delta = 2 layers and
M = n / 4 are ours. "Text" is the text behind the image, its last token where there is none. Layer
10 is the tenth layer, so ten layers run at full length, as the published averages of 312, 268 and
224 tokens imply for 192, 128 and 64; other depths use the same relative layers. All images of a row
are one pool with the sum of their budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..budgets import relative_layers
from ..errors import UnsupportedError
from ..hyperparameters import check_count, check_range
from ..method import Method
from ..reduction import Reduction, ranks
from ..registry import register
from ..views.decoder import DecoderView
from ._common import attended


@register
@dataclass(frozen=True, kw_only=True)
class DIPrune(Method):
    """Keep what the text attends to in a middle layer, with a bonus for tokens that rise.

    Args:
        layer: 0-based layer of a 32-layer LLM after which tokens leave; other depths are scaled.
        delta: layers (of 32) between the two rankings.
        margin: rise that earns the full bonus, as a fraction of the tokens; M / n.
        alpha: weight of the attention; 1 - alpha is that of the rise.
    """

    layer: int = 9
    delta: int = 2
    margin: float = 0.25
    alpha: float = 0.6

    name = "diprune"
    summary = (
        "Keeps what the text attends to in LLM layer 10 and what rises on the way (DIPrune, 2026)"
    )
    needs = frozenset({"ran"})
    default_ratio = 1 / 9
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"keep_tokens": tokens} for tokens in (64, 128, 192)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "delta", "the number of layers between the rankings", least=1)
        check_count(self, "layer", "a 0-based LLM layer", least=0)
        if self.layer < self.delta:
            raise ValueError(
                f"layer is 0-based, at least delta={self.delta}, whose ranking needs a layer; got "
                f"{self.layer}"
            )
        check_range(self, "margin", "a fraction of the tokens", "(]")
        check_range(self, "alpha", "the weight of the attention")

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        layers = relative_layers((self.layer - self.delta, self.layer), of=32, depth=depth)
        if layers[-1] > depth - 2:
            raise UnsupportedError(
                f"{self.name} prunes after 2 layers and needs at least 3; the language model has "
                f"{depth}; use divprune"
            )
        return layers

    def score(self, now: Tensor, before: Tensor, valid: Tensor | None = None) -> Tensor:
        """Score (B, N) from the attention (B, N) in layer l and in layer l - delta."""
        n = now.shape[1] if valid is None else valid.sum(1, keepdim=True)
        rank = ranks(now, valid)
        rise = (ranks(before, valid) - rank) / (self.margin * n)
        score = self.alpha * (1 - rank / n) + (1 - self.alpha) * (rise.clamp(-1, 1) + 1) / 2
        return score.round(decimals=6)  # ranks make many ties, which rounding errors must not break

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        if v.within_budget(self):
            return None
        attention = attended(v, "prompt")
        if v.layer != self.decoder_layers(v.depth)[-1]:
            v.scratch["before"] = attention
            return None
        score = self.score(attention, v.scratch["before"], v.valid)
        return Reduction.from_scores(score, v.budget(self), v.valid)
