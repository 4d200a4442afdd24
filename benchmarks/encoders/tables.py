# SPDX-License-Identifier: Apache-2.0
"""What the results of retrieval and classification have in common: fields, columns, caption."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from ..shared.columns import Column, number, speedup, words
from ..shared.provenance import chip, header
from ..tasks.items import Questions
from .sweep import R, Settings, Swept
from .towers import ImageModel


def result_of(
    benchmark: str,
    model: ImageModel,
    task: Questions,
    settings: Settings,
    found: Swept[R],
    began: float,
    command: str,
) -> dict[str, Any]:
    """What the results of all sweeps have in common, ready for JSON."""
    return {
        **header(benchmark, model.device, command),
        "task": task.name,
        "fingerprint": task.fingerprint,
        "images": len(found.answers),
        "visual_tokens": found.visual_tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "finished": found.finished,
        "skipped": found.skipped,
        "problems": [{"where": where, "why": why} for where, why in task.problems],
        "settings": {
            **asdict(settings),
            "methods": list(settings.methods),
            "keep": [str(k) for k in settings.keep],
        },
        "timing": {
            "from": "preprocessed pixels",
            "to": "output of the image encoder",
            "batch": found.timed_images,
            "warmup_rounds": 1,
            "rounds": settings.repeats,
        },
        "model": model.describe(),
        "rows": [asdict(row) for row in found.rows],
    }


COLUMNS: tuple[Column, ...] = (
    words("method", "method"),
    words("stage", lambda row: ", ".join(row["stages"])),
    number("asked", "asked_tokens"),
    number("kept", "final_tokens"),
    number("FLOPs %", "flops_share", 0, 100),
    number("encode ms", "encode_ms", 1),
    speedup("speed-up", "encode_ratio"),
)


def caption(result: dict[str, Any]) -> str:
    """What a table is about: images, model, machine, and what went wrong."""
    timing = result["timing"]
    parts = [
        f"{result['task']}: {result['images']} images, {result['visual_tokens']} patches each; "
        f"{result['model']['name']} reads {result['model']['reads']}. "
        f"{chip(result)}, {result['model']['dtype']}"
    ]
    if timing["rounds"]:
        parts[0] += (
            f"; encode: {timing['from']} to {timing['to']}, {timing['batch']} images, median of "
            f"{timing['rounds']} after a warm-up"
        )
    if result["skipped"]:
        first = result["skipped"][0]
        parts.append(
            f"{len(result['skipped'])} images left out; the first: {first['where']}: {first['why']}"
        )
    if result["problems"]:
        first = result["problems"][0]
        parts.append(
            f"{len(result['problems'])} rows refused; the first: {first['where']}: {first['why']}"
        )
    if not result["finished"]:
        parts.append("Interrupted: figures are of the images until then")
    return ". ".join(parts) + "."
