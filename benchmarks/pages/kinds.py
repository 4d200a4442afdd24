# SPDX-License-Identifier: Apache-2.0
"""What a result file of each benchmark says: its tables, its fronts, and what did not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ..shared.columns import Column, Table, between, fill, number, speedup, used, words
from ..shared.names import BASELINE
from ..speed.tables import pays
from . import plots
from .parts import Figure, Result, Row, Section, rounded


def text(title: str, key: str) -> Column:
    """A column of a field that is text."""
    return words(title, lambda row: "" if row.get(key) is None else rounded(str(row[key])))


def table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A table of the columns that have something to say."""
    shown = [row.get("method") == BASELINE or row.get("is_chosen") for row in rows]
    return fill(used(columns, rows), rows, title, {i for i, strong in enumerate(shown) if strong})


def _errors(section: Section, rows: Sequence[Row]) -> list[Row]:
    """The rows that ran; the others become notes, a line for each reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get("error"):
            reasons.setdefault(str(row["error"]), {})[str(row["method"])] = None
    section.notes += [f"{', '.join(names)}: not run: {why}" for why, names in reasons.items()]
    return [row for row in rows if not row.get("error")]


def _draw(section: Section, title: str, *drawings: plots.Draw) -> None:
    try:
        section.figures.append(Figure(title, plots.svg(*drawings)))
    except ModuleNotFoundError:
        note = 'No plots: matplotlib is missing (pip install "visual-token-compression[bench]").'
        if note not in section.notes:
            section.notes.append(note)


def _fronts(
    section: Section, rows: Sequence[Row], costs: Sequence[str], quality: plots.Quality, label: str
) -> None:
    """A figure for each cost that was measured, and its front in words."""
    known = [c for c in costs if len(plots.points_of(rows, c, quality)) > 1]
    names = plots.names_of(rows, known, quality)
    for cost in known:
        draw = partial(
            plots.draw_front, rows=rows, cost=cost, names=names, quality=quality, label=label
        )
        title = f"{label} against {plots.COSTS[cost]}"
        _draw(section, title[0].upper() + title[1:], draw)
        front = plots.front_of(rows, cost, quality)
        shown = [f"{r['method']} ({r[cost]:.4g}: {quality(r):.1f})" for r in front]
        section.notes.append(f"Pareto-optimal by {plots.COSTS[cost]}: {', '.join(shown)}")


TASK: tuple[Column, ...] = (
    text("method", "method"),
    number("asked", "asked_tokens"),
    number("kept", "final_tokens"),
    number("average", "average_tokens"),
    between("accuracy %", "accuracy"),
    number("same %", "agreement", 1, 100),
    between("KL nats", "kl", 3, 1.0),
    number("LLM FLOPs %", "flops_share", 0, 100),
    number("all FLOPs %", "flops_all_share", 0, 100),
    number("prefill ms", "prefill_ms", 1),
    speedup("speed-up", "prefill_ratio"),
    number("choosing ms", "method_ms", 1),
    number("KV KiB", "kv_bytes", 0, 1 / 1024),
    number("KV %", "kv_share", 0, 100),
    text("parameters", "parameters"),
)


def _task(section: Section, result: Result) -> None:
    rows = _errors(section, result["rows"])
    kinds = list(dict.fromkeys(k for r in rows for k in r.get("accuracy_by_kind") or {}))
    extra = list(dict.fromkeys(k for r in rows for k in r.get("summary") or {}))
    section.tables.append(table("Methods and budgets; intervals are of 95 %", TASK, rows))
    inner = [
        number(name, (key, name), 1, 100)
        for key, names in (("accuracy_by_kind", kinds), ("summary", extra))
        for name in names
    ]
    if inner:
        columns = [*TASK[:3], *inner]
        section.tables.append(table("Accuracy by kind of question, %", columns, rows))
    if rows and rows[0].get("blank_accuracy") is not None:
        section.notes.append(f"A blank image scores {100 * rows[0]['blank_accuracy']:.1f} %.")
    _fronts(
        section,
        rows,
        ("final_tokens", "flops_all_g", "prefill_ms"),
        plots.accuracy,
        f"accuracy on {result['task']}, %",
    )


ENCODER: tuple[Column, ...] = (
    text("method", "method"),
    number("asked", "asked_tokens"),
    number("kept", "final_tokens"),
    number("FLOPs %", "flops_share", 0, 100),
    number("encode ms", "encode_ms", 1),
    speedup("speed-up", "encode_ratio"),
)
DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}


def _retrieval(section: Section, result: Result) -> None:
    rows = _errors(section, result["rows"])
    recall = [
        between(f"{words} R@{k} %", ("recall", direction, k))
        for direction, words in DIRECTIONS.items()
        for k in ("1", "5", "10")
    ]
    columns = [*ENCODER, *recall]
    section.tables.append(table("Methods and budgets; intervals are of 95 %", columns, rows))

    def quality(row: Row) -> float | None:
        found = [(row.get("recall") or {}).get(d, {}).get("1") for d in DIRECTIONS]
        return None if None in found else 100 * sum(found) / len(found)

    _fronts(
        section,
        rows,
        ("final_tokens", "flops_share", "encode_ms"),
        quality,
        "recall@1, mean of both ways, %",
    )


def _classification(section: Section, result: Result) -> None:
    rows = _errors(section, result["rows"])
    columns = [
        *ENCODER,
        between("top-1 %", "accuracy"),
        number("top-5 %", "top5", 1, 100),
        number("same %", "agreement", 1, 100),
    ]
    section.tables.append(table("Methods and budgets; intervals are of 95 %", columns, rows))
    costs = ("final_tokens", "flops_share", "encode_ms")
    _fronts(section, rows, costs, plots.accuracy, "top-1 accuracy, %")


SPEED: tuple[Column, ...] = (
    text("method", "method"),
    number("kept", "final_tokens"),
    number("FLOPs %", "flops_share", 0, 100),
    number("promised", "promised", 2, 1, "x"),
    number("first token ms", "ttft_ms", 1),
    number("first token", "ttft_speedup", 2, 1, "x"),
    number("stock ms", "stock_ms", 1),
    number("ms", "ms", 1),
    number("measured", "measured", 2, 1, "x"),
    number("reached %", "reached", 0, 100),
    number("vision ms", "vision_ms", 1),
    number("choosing ms", "method_ms", 1),
    number("LLM prefill ms", "llm_prefill_ms", 1),
    number("decode ms", "decode_ms", 2),
    number("decode", "decode_speedup", 2, 1, "x"),
    number("tokens/s", "tokens_per_second"),
    number("answer ms", "answer_ms", 0),
    number("whole answer", "answer_speedup", 2, 1, "x"),
    number("whole prompt", "whole_measured", 2, 1, "x"),
    number("KV MB", "kv_bytes_held", 2, 1e-6),
    number("KV MB held", "kv_bytes_measured", 2, 1e-6),
    number("KV %", "kv_share", 0, 100),
    number("peak MB", "peak_bytes", 0, 1e-6),
    pays("pays"),
)


def _speed(section: Section, result: Result) -> None:
    for part in result["parts"]:
        if part.get("error"):
            section.notes.append(f"{part['title']}: not measured: {part['error']}")
        rows = _errors(section, part["rows"])
        # Before results said "error", a refusal stood in the name.
        section.notes += [f"not run: {r['method']}" for r in rows if len(r) == 1]
        if rows := [r for r in rows if len(r) > 1]:
            section.tables.append(table(str(part["title"]), SPEED, rows))
    lost = where_it_does_not_pay(result)
    if lost:
        section.tables.insert(0, table("Where it does not pay", LOSSES, lost))


LOSSES: tuple[Column, ...] = (
    text("method", "method"),
    number("first token", "ttft_speedup", 2, 1, "x"),
    number("whole answer", "answer_speedup", 2, 1, "x"),
    number("measured", "measured", 2, 1, "x"),
    number("KV %", "kv_share", 0, 100),
    text("where", "title"),
)


def where_it_does_not_pay(result: Result) -> list[Row]:
    """A row for each method and part where compression is no gain in time."""
    if "does_not_pay" in result:
        return result["does_not_pay"]
    found = []  # results up to 0.1 say only how many times as fast
    for part in result["parts"]:
        for row in part["rows"]:
            gain = row.get("whole_measured", row.get("measured"))
            if gain is not None and gain < 1 and not row["method"].startswith("("):
                found.append({**row, "measured": gain, "title": part["title"]})
    return found


CURVE: tuple[Column, ...] = (
    number("keep_ratio", "keep_ratio", 4),
    number("kept", "final_tokens"),
    number("LLM FLOPs %", "flops_share", 0, 100),
    number("divergence, nats", "kl", 4),
    number("at most", "kl_high", 4),
    number("same %", "agreement", 1, 100),
    number("promised: greedy loses at most, points", "promised_loss", 1, 100),
    number("promised: token probabilities move at most, points", "promised_shift", 1, 100),
    between("lost on held-out questions, points", "loss"),
    between("accuracy there, %", "accuracy"),
    text("chosen", "is_chosen"),
)


def _calibration(section: Section, result: Result) -> None:
    for row in _errors(section, result["rows"]):
        held = {h["keep_ratio"]: h for h in row.get("held_out") or ()}
        chosen = row["chosen"]["keep_ratio"]
        rows = [
            {**p, **{k: v for k, v in held.get(p["keep_ratio"], {}).items() if k not in p}}
            | ({"is_chosen": "chosen"} if p["keep_ratio"] == chosen else {})
            for p in row["curve"]
        ]
        limit = f"at most {row['max_divergence']:g} nats, {row['samples']} unlabeled prompts"
        section.tables.append(table(f"{row['method']}: {limit}", CURVE, rows))
        draw = partial(plots.draw_divergence, row=row), partial(plots.draw_loss, row=row)
        for title, drawing in zip(("divergence", "accuracy lost and promised"), draw):
            _draw(section, f"{row['method']}: {title}", drawing)
        if chosen in held:
            lost, point = held[chosen]["loss"], row["chosen"]
            kept = "within" if lost <= point["promised_loss"] else "more than"
            section.notes.append(
                f"{row['method']}: at keep_ratio {chosen:.4f} held-out questions lost "
                f"{100 * lost:.1f} points, {kept} the {100 * point['promised_loss']:.1f} that were "
                f"promised for greedy answers (Pinsker: {100 * point['promised_shift']:.1f})."
            )


BUILD: dict[str, Callable[[Section, Result], None]] = {
    "task": _task,
    "retrieval": _retrieval,
    "classification": _classification,
    "calibration": _calibration,
    "speed": _speed,
}
"""What a section is made by, in the order of the report."""
