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
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from ..errors import UnsupportedError
from ..method import Method, register, relative_layers
from ..reduction import Reduction
from ..views import DecoderView


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
        if len(self.layers) != stages or self.layers[0] < 0 or not _rising(self.layers):
            raise ValueError(
                f"layers are {stages} ascending 0-based layers of 32; got {self.layers}"
            )
        if self.ratios is None:
            return
        if self.keep_ratio is not None or self.keep_tokens is not None:
            raise ValueError("give ratios or a budget (keep_ratio, keep_tokens), not both")
        inside = all(0.0 < r <= 1.0 for r in self.ratios)
        if len(self.ratios) != stages or not inside or not _rising(self.ratios[::-1], ties=True):
            raise ValueError(
                f"ratios are {stages} falling shares of the original tokens, in (0, 1]; got "
                f"{self.ratios}"
            )

    def shares(self, n: int) -> tuple[int, ...]:
        """Tokens of an image with n that each stage leaves."""
        ratios = self.ratios
        if ratios is None and self.keep_ratio is None and self.keep_tokens is None:
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


def _rising(values: tuple[float, ...], ties: bool = False) -> bool:
    return all(a < b or (ties and a == b) for a, b in pairwise(values))


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
        score = v.attention("last", ahead=True)[:, :, 0].mean(1)
        return Reduction.from_scores(score, k, v.valid)
