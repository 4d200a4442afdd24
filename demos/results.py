# SPDX-License-Identifier: Apache-2.0
"""Results of a request so far: one answer, both sides, the rows of a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ..report.report import Report

BASELINE, COMPRESSED = "uncompressed", "compressed"


@dataclass(frozen=True)
class Side:
    """One configuration on one prompt; None is what was not measured (yet).

    Attributes:
        tokens: image tokens that the last layer of the LLM processed; average: over its layers.
        new_tokens: of the answer.
        first_ms, total_ms: from pixels on the device to the first and to the last token.
        peak_bytes: of tensors, see `benchmarks.measure.allocations`; kv_bytes: of the KV cache
            after the prompt.
        flops: of the LLM for image tokens.
    """

    text: str = ""
    tokens: float | None = None
    average: float | None = None
    new_tokens: int | None = None
    first_ms: float | None = None
    total_ms: float | None = None
    peak_bytes: int | None = None
    kv_bytes: int | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of a request: what is known of both sides, `BASELINE` and `COMPRESSED`."""

    status: str
    sides: dict[str, Side]
    report: Report | None = None
    done: bool = False


@dataclass(frozen=True)
class ComparisonRow:
    """A configuration of a comparison; ``error`` says why it has no answer."""

    name: str
    side: Side = Side()
    picture: Image.Image | None = None
    error: str = ""
