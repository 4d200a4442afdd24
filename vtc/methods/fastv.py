# SPDX-License-Identifier: Apache-2.0
"""FastV: rank visual tokens by the last prompt token's attention in an early LLM layer.

Chen et al., An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024, arXiv 2403.06764.

    score_j = mean over heads of A[h, last, j] in layer K - 1 (0-based)
    the best (1 - R) n_v visual tokens enter layer K; position ids are kept

Departures: none known. ``keep_ratio`` is 1 - R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..hyperparameters import check_count
from ..method import Scorer, StageName
from ..registry import register
from ..views.decoder import DecoderView
from ._common import attended


@register
@dataclass(frozen=True, kw_only=True)
class FastV(Scorer):
    """Keep the visual tokens that the last prompt token attends to.

    Args:
        k: LLM layers that see every visual token, at least 1; the paper's K.
    """

    k: int = 2

    name = "fastv"
    summary = "Keeps what the last prompt token attends to after LLM layer 2 (FastV, ECCV 2024)"
    stage: ClassVar[StageName] = "decoder"
    needs = frozenset({"ran"})
    default_ratio = 0.5
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", 288): {"keep_ratio": 0.5, "k": 2},
        ("llava-1.5", 144): {"keep_ratio": 0.25, "k": 2},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "k", "the number of LLM layers that see every token", least=1)

    @property
    def after_layer(self) -> int:
        return self.k - 1

    def score(self, v: DecoderView) -> Tensor:
        return attended(v, "last")
