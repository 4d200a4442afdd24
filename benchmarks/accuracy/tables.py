# SPDX-License-Identifier: Apache-2.0
"""Results as tables: for the terminal and for Markdown.

python -m vtc.benchmarks.accuracy.tables docs/results.md results results/*.json    writes them to
that block
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..shared.budgets import VARIANTS
from ..shared.columns import WHOLE, Column, between, fill, number, speedup, words
from ..shared.columns import markdown as in_markdown
from ..shared.markdown import fill_block
from ..shared.names import BASELINE
from ..shared.provenance import chip, kind_of
from ..speed.tables import overview as speed_overview

__all__ = [
    "BASELINE",
    "COLUMNS",
    "caption",
    "failures",
    "markdown",
    "merged",
    "notes",
    "overview",
    "speed_overview",
]


COLUMNS: tuple[Column, ...] = (
    words("method", "method"),
    words("stage", lambda row: ", ".join(row["stages"])),
    number("asked", "asked_tokens"),
    number("kept", "final_tokens"),
    number("avg", "average_tokens"),
    number("LLM FLOPs %", "flops_share", 0, 100),
    number("all FLOPs %", "flops_all_share", 0, 100),
    number("prefill ms", "prefill_ms", 1),
    speedup("speed-up", "prefill_ratio"),
    number("method ms", "method_ms", 1),
    number("KV KiB", "kv_bytes", 0, 1 / 1024),
    number("KV %", "kv_share", 0, 100),
    between("accuracy % [95 %]", "accuracy", ends=WHOLE),
    number("same %", "agreement", 1, 100),
    number("KL nats", "kl", 4),
)


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
    blank = result["rows"][0]["blank_accuracy"]
    metric = f"; metric {result['metric']}" if "metric" in result else ""
    return (
        f"{result['task']}: {result['questions']} questions about {result['images']} images, "
        f"{result['visual_tokens']} visual tokens{metric}; a blank image scores "
        f"{100 * blank:.1f} %. "
        f"{chip(result)}, {result['model']['dtype']}; prefill: one prompt, "
        f"pixels to first logits, median of {result['timing']['rounds']} after a warm-up."
    )


def markdown(result: dict[str, Any]) -> str:
    """The whole table in Markdown, and what it leaves out."""
    lines = [f"\n{text}" for text in [*failures([result]), *notes(result)]]
    table = in_markdown(fill(COLUMNS, result["rows"]))
    return "\n".join([table, *lines, "", caption(result)])


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
    names = dict.fromkeys(r["method"] for result in results for r in result["rows"][1:])
    cell_of = {
        (id(result), r["asked_tokens"], r["method"]): r
        for result in results
        for r in result["rows"][1:]
    }

    def titled(name: str) -> str:
        variant = ", ".join(f"{k}={v}" for k, v in VARIANTS.get(name, {}).items())
        return f"{name} ({variant})" if variant else name

    def cell(result: dict[str, Any], asked: int | None, name: str) -> str:
        if name == BASELINE:
            return f"**{margin(result['rows'][0])}**"
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

    columns = [words("method", titled)]
    for result in results:
        asked = {r["asked_tokens"] for r in result["rows"][1:]}
        for n in sorted((n for n in asked if n), reverse=True) or [None]:
            size = ", equal FLOPs" if n is None else f", {n} of {result['visual_tokens']}"
            columns.append(words(result["task"] + size, partial(cell, result, n), "right"))
    lines = [in_markdown(fill(columns, (BASELINE, *names)))]
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
    text = speed_overview(read[0]) if kind_of(read[0]) == "speed" else overview(merged(read))
    fill_block(Path(page), block, text)
