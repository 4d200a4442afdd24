# SPDX-License-Identifier: Apache-2.0
"""Results as tables: for the terminal and for Markdown.

python -m vtc.benchmarks.accuracy.tables docs/results.md results results/*.json    writes them to
that block
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..shared.budgets import VARIANTS
from ..shared.columns import Cell, interval, number, speedup
from ..shared.markdown import fill_block
from ..shared.names import BASELINE
from ..speed.tables import overview as speed_overview

__all__ = [
    "BASELINE",
    "COLUMNS",
    "caption",
    "cells",
    "failures",
    "interval",
    "markdown",
    "merged",
    "notes",
    "overview",
    "speed_overview",
    "speedup",
]


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("method", lambda row: row["method"]),
    ("stage", lambda row: ", ".join(row["stages"])),
    ("asked", number("asked_tokens")),
    ("kept", number("final_tokens", 0)),
    ("avg", number("average_tokens", 0)),
    ("LLM FLOPs %", number("flops_share", 0, 100)),
    ("all FLOPs %", number("flops_all_share", 0, 100)),
    ("prefill ms", number("prefill_ms", 1)),
    ("speed-up", speedup),
    ("method ms", number("method_ms", 1)),
    ("KV KiB", number("kv_bytes", 0, 1 / 1024)),
    ("KV %", number("kv_share", 0, 100)),
    ("accuracy % [95 %]", interval),
    ("same %", number("agreement", 1, 100)),
    ("KL nats", number("kl", 4)),
)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table; `failures` says why a method did not run."""
    return [cell(row) for _, cell in COLUMNS]


def failures(results: list[dict[str, Any]]) -> list[str]:
    """A line for each method that did not run, on which tasks, and why."""
    tasks: dict[tuple[str, str], dict[str, None]] = {}
    for result in results:
        for r in result["rows"][1:]:
            if r["error"]:
                why = r["method"], r["error"].split(";")[0]
                tasks.setdefault(why, {})[result["task"]] = None
    return [f"{method} on {', '.join(on)}: {why}" for (method, why), on in tasks.items()]


def notes(result: dict[str, Any]) -> list[str]:
    """What is missing from a result: a line each for an early end and for what was left out."""
    lines = []
    if not result.get("finished", True):
        asked, given = result["questions"], result["questions_given"]
        lines.append(f"{result['task']}: stopped early, {asked} of {given} questions")
    for key, what in (("skipped", "questions that could not be asked"), ("problems", "bad rows")):
        if found := result.get(key):
            first = f"{found[0]['where']}: {found[0]['why']}"
            lines.append(f"{result['task']}: {what}: {len(found)}, the first: {first}")
    return lines


def caption(result: dict[str, Any]) -> str:
    """What the table is about: questions, model, machine."""
    base, where = result["rows"][0], result["machine"]
    blank = base["blank_accuracy"]
    metric = f"; metric {result['metric']}" if "metric" in result else ""
    return (
        f"{result['task']}: {result['questions']} questions about {result['images']} images, "
        f"{result['visual_tokens']} visual tokens{metric}; a blank image scores "
        f"{100 * blank:.1f} %. "
        f"{where.get('gpu', where['cpu'])}, {result['model']['dtype']}; prefill: one prompt, "
        f"pixels to first logits, median of {result['timing']['rounds']} after a warm-up."
    )


def markdown(result: dict[str, Any]) -> str:
    """The whole table in Markdown."""
    lines = [
        "| " + " | ".join(name for name, _ in COLUMNS) + " |",
        "|" + "|".join("---" if i < 2 else "---:" for i in range(len(COLUMNS))) + "|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result["rows"]]
    lines += [f"\n{text}" for text in [*failures([result]), *notes(result)]]
    return "\n".join([*lines, "", caption(result)])


def margin(row: dict[str, Any]) -> str:
    """Accuracy and half of its 95 % interval, in percent."""
    half = (row["accuracy_high"] - row["accuracy_low"]) / 2
    return f"{100 * row['accuracy']:.1f} ±{100 * half:.0f}"


def merged(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result a task, of runs with different methods; where a row comes twice, the last.

    Raises:
        ValueError: runs of one task that asked different questions or models.
    """
    out: dict[str, dict[str, Any]] = {}
    for result in results:
        known = out.setdefault(result["task"], {**result, "rows": []})
        for same in ("questions", "images", "visual_tokens", "model"):
            if known[same] != result[same]:
                raise ValueError(
                    f"runs of {result['task']} differ in {same}: {known[same]}, {result[same]}"
                )
        rows = {(r["method"], r["asked_tokens"]): r for r in [*known["rows"], *result["rows"]]}
        base = rows.pop((BASELINE, result["visual_tokens"]))
        known["rows"] = [base, *(rows[k] for k in sorted(rows, key=lambda k: (k[0], -(k[1] or 0))))]
    return list(out.values())


def overview(results: list[dict[str, Any]]) -> str:
    """A table for docs/results.md: methods down, tasks and budgets across, accuracy in the cells.

    A mark stands where random tokens do better. Results of `vtc bench --flops` have one column a
    task, with the tokens at the end beside it.
    """
    columns: list[tuple[dict[str, Any], int | None]] = []
    for result in results:
        asked = {r["asked_tokens"] for r in result["rows"][1:]}
        tokens = sorted((n for n in asked if n), reverse=True)
        columns += [(result, n) for n in tokens or [None]]
    names = dict.fromkeys(r["method"] for result in results for r in result["rows"][1:])
    cell_of = {
        (id(result), r["asked_tokens"], r["method"]): r
        for result in results
        for r in result["rows"][1:]
    }

    def cell(result: dict[str, Any], asked: int | None, name: str) -> str:
        row = cell_of.get((id(result), asked, name))
        if row is None:  # it takes no budget
            row = cell_of.get((id(result), None, name))
            return "-" if row is None or row["accuracy"] is None else margin(row) + " (all)"
        if row["accuracy"] is None:
            return "-"
        chance = cell_of.get((id(result), asked, "random"))
        low = chance is not None and row["accuracy"] < chance["accuracy"]
        tokens = f" ({row['final_tokens']:.0f})" if asked is None else ""
        return margin(row) + tokens + (" ↓" if low else "")

    head = [
        result["task"] + (", equal FLOPs" if n is None else f", {n} of {result['visual_tokens']}")
        for result, n in columns
    ]
    lines = ["| method | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    base = [f"**{margin(result['rows'][0])}**" for result, _ in columns]
    lines.append("| uncompressed | " + " | ".join(base) + " |")
    for name in names:
        found = [cell(result, n, name) for result, n in columns]
        variant = ", ".join(f"{k}={v}" for k, v in VARIANTS.get(name, {}).items())
        lines.append(f"| {name}{f' ({variant})' if variant else ''} | {' | '.join(found)} |")
    lines += [
        "",
        "Accuracy in % ± half of its 95 % interval (bootstrap over images); ↓: below random.",
    ]
    lines += [
        f"{r['task']}: {r['model']['name']}, {r['questions']} questions on {r['images']} images; "
        f"{r['visual_tokens']} visual tokens in the first prompt; "
        f"blank image {100 * r['rows'][0]['blank_accuracy']:.1f} %."
        for r in results
    ]
    why = failures(results)
    if why:
        lines += ["", "Not run (-):", "", *(f"* {text}" for text in why)]
    return "\n".join(lines)


if __name__ == "__main__":
    page, block, *files = sys.argv[1:]
    read = [json.loads(Path(f).read_text()) for f in files]
    text = (
        speed_overview(read[0]) if read[0].get("benchmark") == "speed" else overview(merged(read))
    )
    fill_block(Path(page), block, text)
