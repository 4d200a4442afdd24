# SPDX-License-Identifier: Apache-2.0
"""PrefixKV: evict from the KV cache, each layer as much as its attention is concentrated.

Wang et al., PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for
Efficient Generation, NeurIPS 2025, arXiv 2412.03409. After the prompt, in layer l:

    c_l(j) = sum over prompt rows of the head-mean attention to slot j
    P_l(k) = share of the k largest c_l in their sum                          (Lorenz curve)
    o_l    = smallest k with P_l(k) >= p, one p for all layers such that sum_l o_l is the budget
    the o_l slots with the largest c_l stay, in order

``scope="visual"`` evicts visual slots only; averaged over the layers, exactly the budget of visual
slots is kept, and all text. ``scope="all"`` is the published form: text and image compete, the
first ``start`` tokens and the last are kept on top of o_l, and while decoding, whenever a layer is
a whole token above its share of all tokens seen, the one 25 places before the end of what was kept
of the prompt goes. The prompt itself runs uncompressed: memory and decoding gain, the prefill does
not.

``ratios`` fixes the fraction of each layer that is forgotten, as published for LLaVA-1.5;
`PrefixKV.calibrate` averages them over samples of any model. Without, p is found anew for each row.

Departures: p is what the published bisection converges to, found by sorting all P_l(k - 1), so the
total is exact where the code stops within 5 slots, then scales and truncates; for the same reason
there is no iteration cap. Column sums of later turns add up. Ties go to the smaller k, then to the
lower layer. The paper's r is keep_ratio, the code's ratio is 1 - keep_ratio. A keep_ratio is a
fraction of visual slots by default and of all slots under ``scope="all"``, where keep_tokens has no
meaning and is refused. Several text tokens at once (a text turn) still pay one eviction per step,
like the published code. The bias of column sums towards early tokens is left as published.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..hyperparameters import check_choice, check_count, check_no_budget, check_shares
from ..method import Method
from ..reduction import Reduction
from ..registry import register
from ..transformers_contract import cache_left
from ..views.cache import CacheView

DISTANCE = 25


def prefix_curve(mass: Tensor) -> Tensor:
    """Cumulative share (..., n) of the largest entries of mass (..., n), in fp64."""
    share = mass.double().sort(dim=-1, descending=True).values
    return (share / share.sum(-1, keepdim=True).clamp(min=1e-300)).cumsum(-1)


def prefix_counts(mass: Tensor, p: float) -> Tensor:
    """Smallest k (...,) such that the k largest of mass (..., n) hold the share p."""
    return ((prefix_curve(mass) < p).sum(-1) + 1).clamp(max=mass.shape[-1])


def allocate(mass: Tensor, allowed: Tensor, total: Tensor) -> Tensor:
    """Counts (B, L) of one threshold p for all layers, that sum to the total of each row.

    Layer l gets its k-th slot before layer m gets its i-th if P_l(k - 1) < P_m(i - 1).

    Args:
        mass: (B, L, n), 0 on slots that do not count; allowed: (B, L), the most a layer may get.
        total: (B,).
    """
    layers, n = mass.shape[1:]
    before = torch.nn.functional.pad(prefix_curve(mass)[..., :-1], (1, 0))
    within = torch.arange(n, device=mass.device) < allowed.unsqueeze(-1)
    order = before.masked_fill(~within, torch.inf).transpose(1, 2).flatten(1)
    order = order.argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    taken = (rank < total[:, None]).unflatten(1, (n, layers)).transpose(1, 2) & within
    return taken.sum(-1)


@register
@dataclass(frozen=True, kw_only=True)
class PrefixKV(Method):
    """Evict KV slots, with one attention share for all layers.

    Args:
        scope: "visual" evicts visual slots, "all" text as well, as published.
        ratios: fraction that each LLM layer forgets, instead of a budget.
        start: first tokens that stay under scope="all".
    """

    scope: Literal["visual", "all"] = "visual"
    ratios: tuple[float, ...] | None = None
    start: int = 1

    name = "prefixkv"
    summary = (
        "Evicts KV slots after the prompt, each layer by how concentrated its attention is "
        "(PrefixKV, NeurIPS 2025)"
    )
    default_ratio = 0.5
    once: ClassVar[dict[str, Any]] = {"scope": "visual"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "scope", ("visual", "all"))
        if self.scope == "all" and self.keep_tokens is not None:
            raise ValueError('keep_tokens counts visual tokens; scope="all" takes keep_ratio')
        check_count(self, "start", "a count of tokens", least=0)
        if self.ratios is not None:
            object.__setattr__(self, "ratios", tuple(self.ratios))
        check_no_budget(self, "ratios")
        check_shares(self, "ratios", "fractions to forget, one for each layer", ends="[)")

    @property
    def while_decoding(self) -> bool:
        return self.scope == "all"

    @property
    def compiles(self) -> bool:
        return False

    @property
    def has_budget(self) -> bool:
        return self.ratios is None and self.scope == "visual"

    def note_cache(self, v: CacheView) -> None:
        here = v.visual if self.scope == "visual" else torch.ones_like(v.visual)
        here = here if v.valid is None else here & v.valid
        seen = here[:, -v.queries :].sum(1, keepdim=True).expand_as(here)
        if "seen" in v.scratch:
            seen = seen + v.scratch["seen"].amax(1, keepdim=True)
        v.scratch["seen"] = seen
        if v.step == 0:
            mass = v.attention_received()
            if "mass" in v.scratch:
                mass = mass + v.scratch["mass"].clamp(min=0)
            v.scratch["mass"] = mass.where(here, -1.0)

    def on_cache(self, v: CacheView) -> Reduction | None:
        if v.step > 0:
            return self._pay(v)
        if v.layer == 0:
            self._plan(v)
        mass, keep = v.scratch["mass"], v.scratch["keep"].amax(1)
        here = mass >= 0
        seen = v.scratch["seen"].amax(1)
        forget = 1 - keep.double() / seen.clamp(min=1)
        v.scratch["forget"] = forget[:, None].expand_as(mass)
        if bool((keep >= here.sum(1)).all()):
            return None
        if self.scope == "visual":
            fixed = ~here if v.valid is None else ~here & v.valid
            return Reduction.from_scores(
                mass.masked_fill(fixed, torch.inf), keep + fixed.sum(1), v.valid
            )
        place = here.long().cumsum(1) - 1
        fixed = (place < self.start) | (place == here.sum(1, keepdim=True) - 1)
        return Reduction.from_scores(mass.masked_fill(fixed & here, torch.inf), keep, here)

    def _plan(self, v: CacheView) -> None:
        """Note for every layer how many of its slots stay."""
        device = v.keys.device
        masses = [notes["mass"].to(device) for notes in v.peers]
        n = max(m.shape[1] for m in masses)
        mass = torch.stack(
            [torch.nn.functional.pad(m, (0, n - m.shape[1]), value=-1.0) for m in masses], 1
        )
        count = (mass >= 0).sum(-1)  # (B, L) slots that are there
        seen = torch.stack([notes["seen"].amax(1).to(device) for notes in v.peers], 1)
        guard = 0 if self.scope == "visual" else self.start + 1
        if self.ratios is not None:
            if len(self.ratios) != v.depth:
                raise ValueError(f"ratios has {len(self.ratios)} layers, the model has {v.depth}")
            ratios = torch.tensor(self.ratios, device=device, dtype=torch.float64)
            keep = seen - (seen * ratios).round().long()
        else:
            if self.scope == "visual":
                total = v.budget.to(device) * v.depth
            else:
                share = self.default_ratio if self.keep_ratio is None else self.keep_ratio
                total = (seen.sum(1).double() * share).round().long()
            free = (count - guard).clamp(min=0)
            keep = allocate(mass.clamp(min=0), free, total - guard * v.depth) + guard
        keep = torch.minimum(keep.clamp(min=guard + 1), count)
        for i, notes in enumerate(v.peers):
            notes["keep"] = keep[:, i : i + 1].to(notes["mass"].device).expand_as(notes["mass"])
            notes["place"] = notes["keep"] - DISTANCE

    def _pay(self, v: CacheView) -> Reduction | None:
        """Evict one slot of the rows that hold a whole token more than their share."""
        here = torch.ones_like(v.visual) if v.valid is None else v.valid
        n, place = here.sum(1), here.long().cumsum(1) - 1
        seen, forget, at = (v.scratch[k].amax(1) for k in ("seen", "forget", "place"))
        owed = n - seen * (1 - forget) >= 1
        if not bool(owed.any()):
            return None
        at = at.where(at >= 1, n // 2)
        return Reduction.from_mask(here & ~((place == at[:, None]) & owed[:, None]))

    @classmethod
    def calibrate(
        cls, model: Any, samples: Iterable[dict[str, Any]], **parameters: Any
    ) -> PrefixKV:
        """The method with ``ratios`` that a model forgets on average over samples.

        Args:
            model: an unwrapped model; samples: keyword arguments of its forward.
            parameters: of the search, such as ``keep_ratio=0.2`` and ``scope="all"``.
        """
        from ..session import compressing

        search, found = cls(**parameters), []
        with torch.no_grad(), compressing(model, search):
            for sample in samples:
                cache = cache_left(model(**{**sample, "use_cache": True}))
                forgot = [layer.scratch[0]["forget"].amax(1).cpu() for layer in cache.layers]
                found.append(torch.stack(forgot, 1))
        if not found:
            raise ValueError("calibrate needs at least one sample")
        ratios = torch.cat(found).mean(0).clamp(0, 1 - 1e-6).tolist()
        return cls(scope=search.scope, start=search.start, ratios=tuple(ratios))
