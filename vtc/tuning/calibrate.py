# SPDX-License-Identifier: Apache-2.0
"""`calibrate`: the strongest compression whose answers stay near those of the uncompressed model.

No labels are needed: the stock model is the reference. For each prompt it answers greedily; then
the compressed model is made to write the same answer, through the same `generate` and on its own
compressed KV cache, and at every step the two next-token distributions are compared,

    KL(p_stock || p_compressed) = sum_v p_stock(v) (log p_stock(v) - log p_compressed(v)),

in nats and fp32, mean over the steps of the answer, its end token included. A prompt counts at most
2 nats: from there on Pinsker's inequality allows any change. Methods see the prompt at prefill and
never the answer.

**The rule.** The mean over the prompts is only an estimate. What has to stay within
``max_divergence`` is its one-sided 95 % upper confidence bound (`mean_bound`), so few prompts
cannot show little divergence: n prompts without any show that it is below about 6 / n nats. A grid
of budgets is measured first, then the gap between the last budget that passes and the first that
fails is bisected over the tokens. Divergence need not fall with every token kept, so a budget is
chosen only if every weaker compression that was measured passes as well: tests in a fixed order,
strongest last, that end at the first failure (Angelopoulos et al. 2021, "Learn then Test"). As long
as the curve falls with the budget, such a search keeps the 5 % however many budgets it tries.

**What is promised**, about prompts drawn like the samples, with 95 % confidence:

* `Point.promised_shift`, by Pinsker's inequality: the probability of any next token, the right one
  among them, moves by at most sqrt(KL / 2) on average over prompts and steps. For answers of one
  token this bounds the loss of accuracy when tokens are sampled. Of the chosen budget the promise
  is sqrt(max_divergence / 2).
* `Point.promised_loss`: greedy answers lose at most this much of any score between 0 and 1, since
  a score can only fall where the answer changes; it is the upper bound of the share of changed
  answers (Clopper & Pearson 1934). The budget was chosen by the same prompts, so this holds for all
  budgets of a search together (Bonferroni).

**What is not**: anything about data unlike the samples (other images, questions, languages, longer
answers), nor about one prompt by itself. Answers of several tokens are compared along the stock
answer only. Prompts about one image are not independent: give one prompt for each image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, log, log1p, sqrt
from typing import Any

import numpy as np
from torch import nn

from ..errors import UnsupportedError
from ..method import Chain, Method
from ..registry import resolve
from ..report.report import Report
from ..session import Session, compressing, observe
from .bounds import LEVEL, mean_bound, share_bound
from .divergence import StockAnswer, generate
from .match import at_ratio, check_tune, label, largest_image

GRID = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
CAP = 2.0
"""Nats that a prompt counts at most; sqrt(CAP / 2) is 1, the largest change there can be."""


@dataclass(frozen=True)
class Point:
    """Effects of one budget on the answers; bounds are one-sided, at 95 %.

    Attributes:
        keep_ratio: the budget; final_tokens: visual tokens in the last LLM layer, mean over the
            prompts; flops_share: FLOPs of visual tokens in the LLM, relative to the stock model.
        kl, kl_low, kl_high: divergence in nats, mean over the prompts, and its bounds.
        agreement: share of prompts whose greedy answer is the same.
        promised_loss: what greedy accuracy loses at most: upper bound of the changed answers, at
            95 % for all budgets of the search together.
        promised_shift: what the probability of a next token changes by at most, on average:
            min(1, sqrt(kl_high / 2)).
    """

    keep_ratio: float
    final_tokens: float
    flops_share: float
    kl: float
    kl_low: float
    kl_high: float
    agreement: float
    promised_loss: float
    promised_shift: float

    def __str__(self) -> str:
        return (
            f"keep_ratio {self.keep_ratio:.4f}: {self.final_tokens:6.1f} tokens, divergence "
            f"{self.kl:.4f} (at most {self.kl_high:.4f}) nats, {self.agreement:.1%} of the answers "
            f"the same, greedy accuracy loses at most {self.promised_loss:.1%}"
        )


@dataclass(frozen=True)
class Calibration:
    """Findings of `calibrate`.

    Attributes:
        method: ready for `vtc.wrap`, with the chosen keep_ratio.
        chosen: the point of the curve that it stands at.
        curve: every budget that was measured, largest first.
        max_divergence, max_new_tokens, prompts: the limit in nats, the length of the answers, and
            how many prompts (rows of the samples) were compared.
    """

    method: Method | Chain
    chosen: Point
    curve: tuple[Point, ...]
    max_divergence: float
    max_new_tokens: int
    prompts: int

    @property
    def keep_ratio(self) -> float:
        """The chosen budget of the method that was tuned."""
        return self.chosen.keep_ratio

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; the method as text."""
        return {
            "method": str(self.method),
            "keep_ratio": self.keep_ratio,
            "max_divergence": self.max_divergence,
            "max_new_tokens": self.max_new_tokens,
            "samples": self.prompts,
            "chosen": asdict(self.chosen),
            "curve": [asdict(point) for point in self.curve],
        }

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.prompts} prompts, at most {self.max_divergence:g} nats"]
        for point in self.curve:
            lines.append(f"{'->' if point is self.chosen else '  '} {point}")
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    method: str | Method | Chain,
    max_divergence: float,
    *,
    max_new_tokens: int = 16,
    grid: Sequence[float] = GRID,
    steps: int = 4,
    tune: int = -1,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """The strongest compression that stays within a divergence of the stock model on your data.

    ``vtc.calibrate(model, prompts, "visionzip", max_divergence=0.05).method`` goes to `vtc.wrap`.
    See the module's docstring for the rule, and for what it promises and what not. It runs the
    prompts through the stock model ``1 + steps`` times and through the compressed one
    ``len(grid) + steps`` times, one sample in memory at a time.

    Args:
        model: a supported multimodal LLM that is not wrapped.
        samples: what its processor gave, a mapping of keyword arguments for each call of
            ``generate``, with images and on the model's device; without labels. Each row of a batch
            is one prompt. A list, or an object that starts anew each time it is iterated.
        method: a name, a method or a chain. A budget that it has is replaced.
        max_divergence: nats, in (0, 2).
        max_new_tokens: length of the stock model's answers, which the comparison goes along.
        grid: budgets that are measured first, in (0, 1].
        steps: how often the gap between a budget that passes and one that fails is halved.
        tune: which method of a chain is tuned, by its place; the last one by default.
        seed: of the draws of the bound.
        progress: called with what is running, calls of ``generate`` done, and about how many there
            are.

    Raises:
        UnsupportedError: an encoder alone, a method that does not fit the model or has no
            keep_ratio, or no budget that passes; the message then gives the nearest one.
        ValueError: arguments out of range; samples that are too few for the limit, can be read only
            once, change between two readings or have no image; a model that is wrapped.
    """
    if not 0.0 < max_divergence < CAP:
        raise ValueError(f"max_divergence is in nats, in (0, {CAP:g}); got {max_divergence}")
    if max_new_tokens < 1 or steps < 0:
        raise ValueError(
            f"max_new_tokens is at least 1 and steps at least 0; got {max_new_tokens}, {steps}"
        )
    if not grid or not all(0.0 < share <= 1.0 for share in grid):
        raise ValueError(f"grid holds budgets in (0, 1]; got {tuple(grid)}")
    members = resolve(method)
    check_tune(members, tune)
    search = _CurveSearch(model, samples, members, tune, max_new_tokens, seed, progress)
    least = ceil(log(1 - LEVEL) / log1p(-max_divergence / CAP))
    if search.prompts < least:
        raise ValueError(
            f"{search.prompts} prompts cannot show a mean divergence of {max_divergence:g} nats at "
            f"{LEVEL:.0%}, even if they have none: give at least {least}, better twice as many, or "
            "raise max_divergence"
        )
    counts = sorted({max(1, round(share * search.tokens)) for share in grid}, reverse=True)
    search.budgets = len(counts) + steps
    search.total = search.calls * (1 + len(counts) + 2 * steps)
    search.measure(counts)
    for _ in range(steps):
        good, bad = search.bracket(max_divergence)
        if good is None or good - bad <= 1:
            break
        middle = round(sqrt(good * max(bad, 1)))
        search.measure([min(max(middle, bad + 1), good - 1)])
    good, _ = search.bracket(max_divergence)
    if good is None:
        raise search.unreached(max_divergence)
    points = search.points
    return Calibration(
        method=search.at(good),
        chosen=points[good],
        curve=tuple(points[k] for k in sorted(points, reverse=True)),
        max_divergence=max_divergence,
        max_new_tokens=max_new_tokens,
        prompts=search.prompts,
    )


class _CurveSearch:
    """Points of the curve of one method or chain, by the tokens of an image that it keeps."""

    def __init__(
        self,
        model: Any,
        samples: Iterable[Mapping[str, Any]],
        members: tuple[Method, ...],
        tune: int,
        max_new_tokens: int,
        seed: int,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        if isinstance(samples, Mapping) or not isinstance(samples, Iterable):
            raise ValueError("samples is a list of what the processor gave, one for each call")
        if isinstance(samples, Iterator):
            raise ValueError(
                "samples is an iterator, which can be read once, and calibration reads the samples "
                "several times: give list(samples), or an object with an __iter__ that starts anew"
            )
        self.model, self.samples, self.seed = model, samples, seed
        self.members, self.tune = members, tune
        self.max_new_tokens, self.progress = max_new_tokens, progress
        self.points: dict[int, Point] = {}
        self.refused: dict[int, ValueError] = {}
        self.done = self.total = 0
        self.budgets = 1
        rows = [_rows(sample, i) for i, sample in enumerate(samples)]
        if not rows:
            raise ValueError("samples is empty")
        self.calls, self.prompts = len(rows), sum(rows)
        if not hasattr(model, "generate"):
            raise UnsupportedError(
                f"{type(model).__name__} does not generate, so it has no next-token distribution "
                "to compare; calibrate the multimodal LLM that an encoder belongs to, or measure "
                "the encoder by a retrieval or classification task"
            )
        with observe(model) as session:
            generate(model, next(iter(samples)), 1)
            _report(session, 0)
            self.tokens = largest_image(session)

    def at(self, k: int) -> Method | Chain:
        return at_ratio(self.members, self.tune, k / self.tokens)

    def measure(self, counts: Sequence[int]) -> None:
        """One pass over the samples: the points of these token counts."""
        taken: dict[int, list[_Facts]] = {k: [] for k in counts}
        prompts = 0
        for i, sample in enumerate(self.samples):
            stock = StockAnswer.of(self.model, sample, self.max_new_tokens)
            self._tick("uncompressed")
            prompts += len(stock.written)
            for k in counts:
                if k not in self.refused:
                    facts = self._compare(sample, stock, i, k)
                    if facts is not None:
                        taken[k].append(facts)
                self._tick(f"{_name(self.members)}, {k} of {self.tokens}")
        if prompts != self.prompts:
            raise ValueError(
                f"samples gave {self.prompts} prompts when they were read first and {prompts} now; "
                "they have to be the same each time: give a list"
            )
        for k in counts:
            if k not in self.refused:
                self.points[k] = _point(k / self.tokens, taken[k], self.budgets, self.seed)

    def _compare(self, sample: Any, stock: StockAnswer, i: int, k: int) -> _Facts | None:
        """One sample at one budget; None where the method cannot keep so few."""
        with compressing(self.model, self.at(k)) as session:
            try:
                kl, same = stock.compare(self.model, sample)
            except ValueError as error:
                self.refused[k] = error
                return None
            report = _report(session, i)
        if not kl.isfinite().all():
            raise ValueError(
                f"sample {i}: the logits are not finite at {k} tokens; use a wider dtype, such as "
                "bfloat16 instead of float16"
            )
        share = (report.flops or 0.0) / (report.flops_full or 1.0)
        return _Facts(kl.tolist(), same.tolist(), report.final_tokens, share)

    def _tick(self, text: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(text, self.done, max(self.total, self.done))

    def bracket(self, limit: float) -> tuple[int | None, int]:
        """The smallest count that passes, with all above it, and the next one below that fails."""
        good: int | None = None
        for k in sorted({*self.points, *self.refused}, reverse=True):
            if k in self.refused or self.points[k].kl_high > limit:
                return good, k
            good = k
        return good, 0

    def unreached(self, limit: float) -> UnsupportedError:
        if not self.points:
            why = next(iter(self.refused.values()))
            return UnsupportedError(f"{label(self.members)} ran at no budget that was tried: {why}")
        best = min(self.points.values(), key=lambda point: point.kl_high)
        return UnsupportedError(
            f"{label(self.members)} stays within {limit:g} nats at no budget that was tried, with "
            f"the weakest compressions first; the best is {best}: raise max_divergence, or give "
            f"more than {self.prompts} prompts, which narrows the bound"
        )


@dataclass(frozen=True)
class _Facts:
    """One sample at one budget: divergence and sameness of each row, tokens, share of FLOPs."""

    kl: list[float]
    same: list[bool]
    final_tokens: float
    flops_share: float


def _report(session: Session, i: int) -> Report:
    try:
        return session.report()
    except RuntimeError as error:
        raise ValueError(f"sample {i} has no image or video; leave it out") from error


def _rows(sample: Any, i: int) -> int:
    """Prompts of one sample."""
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    if ids is None:
        raise ValueError(
            f"sample {i} is a mapping of keyword arguments with input_ids, as a processor gives "
            f"it; got {sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__}"
        )
    return len(ids)


def _name(members: tuple[Method, ...]) -> str:
    return " + ".join(m.name for m in members)


def _point(ratio: float, facts: Sequence[_Facts], budgets: int, seed: int) -> Point:
    kl = np.minimum([x for f in facts for x in f.kl], CAP)
    same = [x for f in facts for x in f.same]
    rows = [len(f.kl) for f in facts]
    high = mean_bound(kl, CAP, seed)
    return Point(
        keep_ratio=ratio,
        final_tokens=float(np.average([f.final_tokens for f in facts], weights=rows)),
        flops_share=float(np.average([f.flops_share for f in facts], weights=rows)),
        kl=float(kl.mean()),
        kl_low=max(0.0, CAP - mean_bound(CAP - kl, CAP, seed)),
        kl_high=high,
        agreement=sum(same) / len(same),
        promised_loss=share_bound(len(same) - sum(same), len(same), 1 - (1 - LEVEL) / budgets),
        promised_shift=sqrt(high / 2),
    )
