# SPDX-License-Identifier: Apache-2.0
"""TokenCorrCompressor: as many patches as are no near duplicates; the others fold into them.

Inspired by Zhang et al., Token-level Correlation-guided Compression for Efficient Multimodal
Document Understanding, arXiv 2407.14439, which has no public code and leaves much open. For each
image or crop of n patches, with S the cosines of the keys of an early block:

    redundant = { i : #{ j != i : S_ij > t_s } > t_c };  density = 1 - share of redundant patches
    local     = n density patches, at least 1, drawn by the [CLS] attention of the early block
    global    = outliers (above Q3 + 1.5 (Q3 - Q1)) of the [CLS] attention of a late block
    chosen    = local and global; every other patch folds into its most correlated chosen one

Departures: the paper gives neither the blocks nor t_s, t_c nor the weights of the mean. Here early
is the second block and late the last, and a group becomes its plain (size-weighted) mean; t_s =
0.95 and t_c = 8 keep about 70 % of a dense page of text on the embedded DINOv2 tower, 40 % of a
page half full and a few patches of a blank one (the paper reports 66 % on average); keys of other
towers may need another t_s.
The draw is replaced by the top of the same distribution; ``deterministic=False`` draws without
replacement, from a hash of the patch and ``seed`` in place of a random generator, so an image gets
the same patches in any batch. With a budget, which the paper does not have, global patches come
first and local ones fill what they leave. ``saliency="received"`` is for encoders without [CLS].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import UnsupportedError
from ..hyperparameters import check_count, check_range
from ..kernels.similarity_reduce import similarity_count
from ..method import Method
from ..reduction import Reduction, marked, ranks, top_k
from ..registry import register
from ..views.features import FeaturesView
from ._common import Saliency, check_saliency, into_chosen, noise, outliers, saliency_of


def informative(x: Tensor, threshold: float, duplicates: int) -> Tensor:
    """(B,) tokens of x (B, N, C), at least 1, with at most so many others above a cosine to it."""
    near = similarity_count(x, threshold=threshold, exclude_diag=True)
    return (near <= duplicates).sum(1).clamp(min=1)


def gumbel(index: Tensor, seed: int) -> Tensor:
    """Gumbel noise by patch index and seed: the top k of log p + noise is a draw by p."""
    return -(-((noise(index, seed) + 0.5) / 2.0**32).log()).log()


@register
@dataclass(frozen=True, kw_only=True)
class TokenCorr(Method):
    """Keep as many patches as the image has information, merge the rest by correlation.

    Args:
        early, late: encoder blocks of the local and of the global patches; negative from the end.
        similarity: t_s, the cosine of keys above which two patches are near duplicates.
        duplicates: t_c, near duplicates that a patch may have without being redundant.
        deterministic: take the top of the local distribution; False, draw from it.
        seed: of the draw.
        saliency: "cls", attention of [CLS], or "received", the mean attention a patch receives.
    """

    early: int = 1
    late: int = -1
    similarity: float = 0.95
    duplicates: int = 8
    deterministic: bool = True
    seed: int = 0
    saliency: Saliency = "cls"

    name = "tokencorr"
    summary = (
        "Keeps as many patches as are no near duplicates, merges the rest; adaptive, inspired by "
        "(TokenCorrCompressor, arXiv 2407.14439)"
    )
    default_ratio = 0.66
    needs = frozenset({"cls"})
    without_cls: ClassVar[dict[str, Any]] = {"saliency": "received"}
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self)
        for field in ("early", "late", "seed"):
            check_count(self, field)
        check_count(self, "duplicates", "a count of patches", least=0)
        check_range(self, "similarity", "a cosine", low=-1)

    @property
    def compiles(self) -> bool:
        return self.budget_given

    @property
    def has_budget(self) -> bool:
        return self.budget_given

    def captures(self, depth: int) -> tuple[int, ...]:
        for field in ("early", "late"):
            block = getattr(self, field)
            if not -depth <= block < depth:
                raise UnsupportedError(
                    f"tokencorr reads encoder block {block} ({field}) and this encoder has "
                    f"{depth}; give one from {-depth} to {depth - 1}"
                )
        return (self.early % depth, self.late % depth)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        n, k = v.count, v.budget(self) if self.has_budget else None
        if k is not None and k >= n:
            return None
        key = v.key(self.early).flatten(2)
        local = saliency_of(v, self.early, self.saliency)
        if not self.deterministic:
            local = local.clamp(min=1e-30).log() + gumbel(v.index.to(local.device), self.seed)
        late = saliency_of(v, self.late, self.saliency)
        stands_out = outliers(late)
        if k is None:
            count = informative(key, self.similarity, self.duplicates)
            chosen = (ranks(local) < count[:, None]) | stands_out
        else:
            first = (2 * n - ranks(late)).where(stands_out, n - ranks(local))
            chosen = marked(top_k(first, k), n)
        return Reduction.from_merge(into_chosen(key, chosen), k).ranked(local)
