# SPDX-License-Identifier: Apache-2.0
"""The rows of a result: one for each method at each budget, and what is computed for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..metrics.scores import Metric
from ..metrics.statistics import bootstrap


@dataclass
class AccuracyRow:
    """One method at one budget. Times in milliseconds; shares and ratios are of the stock model.

    ``kl`` is the mean KL divergence from the stock model in nats (see `answering`), ``agreement``
    the share of answers that are those of the stock model, ``summary`` what the metric says of all
    answers together. Intervals are of 95 %. None: not measured.
    """

    method: str
    stages: list[str]
    asked_tokens: int | None
    parameters: str = ""
    final_tokens: float | None = None
    average_tokens: float | None = None
    flops_g: float | None = None
    flops_share: float | None = None
    flops_all_g: float | None = None
    flops_all_share: float | None = None
    prefill_ms: float | None = None
    prefill_ratio: float | None = None
    vision_ms: float | None = None
    llm_prefill_ms: float | None = None
    method_ms: float | None = None
    kv_bytes: int | None = None
    kv_share: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    agreement: float | None = None
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    blank_accuracy: float | None = None
    accuracy_by_kind: dict[str, float] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def fill_scores(
    row: AccuracyRow,
    answers: Sequence[dict[str, Any]],
    asked: Sequence[dict[str, Any]],
    metric: Metric,
    seed: int,
) -> None:
    """Fill in scores and divergence of one configuration.

    Args:
        answers: its lines of the journal, and ``asked`` those of the stock model, in one order.
    """
    groups, kinds = [x["image"] for x in asked], np.asarray([x["kind"] for x in asked])
    scores = np.asarray([x["score"] for x in answers])
    row.accuracy = float(scores.mean())
    row.accuracy_low, row.accuracy_high = bootstrap(scores, groups, seed)
    row.accuracy_by_kind = {
        kind: float(scores[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))
    }
    row.agreement = float(np.mean([x["same"] for x in answers]))
    if all(x["kl"] is not None for x in answers):
        kl = np.asarray([x["kl"] for x in answers])
        row.kl = float(kl.mean())
        row.kl_low, row.kl_high = bootstrap(kl, groups, seed)
    if metric.summary is not None:
        predictions = [x["prediction"] for x in answers]
        row.summary = metric.summary(predictions, [x["answers"] for x in asked])


def fill_costs(row: AccuracyRow, facts: dict[str, Any], baseline: dict[str, Any]) -> None:
    """Fill in costs by `timing.measure`, absolute and relative to the stock model."""
    report = facts["report"]
    row.final_tokens, row.average_tokens = report.final_tokens, report.average_tokens
    row.flops_g, row.flops_all_g = _giga(report.flops), _giga(report.flops_all)
    row.flops_share = _over(report.flops, report.flops_full)
    row.flops_all_share = _over(report.flops_all, report.flops_all_full)
    for name in ("prefill_ms", "vision_ms", "llm_prefill_ms", "method_ms"):
        setattr(row, name, facts[name])
    row.prefill_ratio = _over(facts["prefill_ms"], baseline["prefill_ms"])
    row.kv_bytes = facts["kv_bytes"]
    row.kv_share = _over(facts["kv_bytes"], baseline["kv_bytes"])


def _giga(x: float | None) -> float | None:
    return None if x is None else x / 1e9


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
