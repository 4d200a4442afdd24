# SPDX-License-Identifier: Apache-2.0
"""Result files as one report: what each of them says, ready for `page` to write.

`read` takes result files of any age, `sections` makes a `Section` of each: tables, figures, notes
and where it comes from. Nothing is computed that the files do not hold; what is missing in a file
is missing in its section, and a section says what was skipped and whether a run was finished.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from . import plots

Row = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Text, and what a table is sorted by: a number, or the text itself."""

    text: str
    value: float | None = None


@dataclass
class Table:
    """Rows of cells; ``strong`` are those of the stock model, or of what was chosen."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    strong: set[int] = field(default_factory=set)

    @property
    def words(self) -> set[int]:
        """The columns that are text."""
        columns = range(len(self.head))
        return {i for i in columns if all(line[i].value is None for line in self.rows)}


@dataclass
class Figure:
    """A drawing as SVG, or a picture as a data URI."""

    title: str
    svg: str = ""
    picture: str = ""


@dataclass
class Section:
    """What one result file says.

    Attributes:
        brief: what the table at the top says of it, by heading.
        facts: name and text of where it comes from, the command first.
        notes: sentences: what was skipped, refused, not finished, where compression does not pay.
    """

    title: str
    source: str
    brief: dict[str, str] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


# ---- reading ----------------------------------------------------------------------------------


def read(paths: Iterable[Path]) -> tuple[list[tuple[Path, Result]], list[tuple[str, str]]]:
    """Result files, and those of a folder's JSON files that are none, each with the reason.

    Raises:
        ValueError: no result file among them; the message says why.
    """
    found: list[tuple[Path, Result]] = []
    refused: list[tuple[str, str]] = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            refused.append((str(path), "a folder without .json files"))
        for file in inside:
            try:
                found.append((file, _checked(json.loads(file.read_text("utf-8")))))
            except OSError as error:
                refused.append((str(file), error.strerror or str(error)))
            except ValueError as error:
                refused.append((str(file), f"no result file: {error}"))
    if not found:
        why = "; ".join(f"{where}: {reason}" for where, reason in refused) or "no path was given"
        raise ValueError(f"nothing to report: {why}")
    return found, refused


def _checked(result: Any) -> Result:
    if not isinstance(result, dict):
        raise ValueError("not a JSON object")
    kind = kind_of(result)
    if kind not in BUILD:
        raise ValueError(f'"benchmark" is "{kind}", none of {", ".join(BUILD)}')
    rows = result.get("parts" if kind == "speed" else "rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("no rows")
    return result


def kind_of(result: Result) -> str:
    """Which benchmark wrote a result; "task" of files from before they said so."""
    return str(result.get("benchmark", "task" if "task" in result else ""))


def sections(results: Sequence[tuple[Path, Result]]) -> list[Section]:
    """A section for each result, in order of the benchmarks and of the files."""
    order = list(BUILD)
    ranked = sorted(results, key=lambda pair: order.index(kind_of(pair[1])))
    return [_section(path, result) for path, result in ranked]


def _section(path: Path, result: Result) -> Section:
    kind, task = kind_of(result), str(result.get("task", ""))
    usual = path.stem in (task, f"{kind}-{task}")
    name = task if usual else f"{task} ({path.stem})" if task else path.stem
    section = Section(name if kind == "task" else f"{kind}: {name}", str(path))
    section.facts, section.notes = _facts(result), _missing(result)
    try:
        BUILD[kind](section, result)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        section.notes.append(f"the rest of this file cannot be shown: {error!r}")
    section.notes = list(dict.fromkeys(map(rounded, section.notes)))
    section.figures += _pictures(path)
    section.brief = _brief(section, result)
    return section


def _brief(section: Section, result: Result) -> dict[str, str]:
    known = {key: result.get(key) for key in ("model", "machine")}
    model, machine = (x if isinstance(x, dict) else {} for x in known.values())
    left_out = sum(len(result.get(key) or ()) for key in ("skipped", "problems"))
    state = "finished" if result.get("finished", True) else "not finished"
    return {
        "date": str(result.get("date", ""))[:10],
        "model": str(model.get("name", "")),
        "machine": str(machine.get("gpu", machine.get("cpu", ""))),
        "rows": str(len(section.tables[0].rows)) if section.tables else "0",
        "state": f"{state}, {left_out} left out" if left_out else state,
    }


def _facts(result: Result) -> list[tuple[str, str]]:
    """Where a result comes from: command, date, model, machine, versions, settings."""
    out = [("command", str(result.get("command") or "not recorded"))]
    out += [(k, str(result[k])) for k in ("date", "metric") if result.get(k)]
    counts = [
        f"{result[k]} {k.replace('_', ' ')}"
        for k in ("questions", "images", "captions", "classes", "visual_tokens")
        if result.get(k)
    ]
    if counts:
        out.append(("asked", ", ".join(counts)))
    if result.get("seconds"):
        out.append(("took", f"{result['seconds']} s"))
    for name in ("model", "machine", "versions", "settings", "timing"):
        known = result.get(name)
        if isinstance(known, dict):
            shown = {k: v for k, v in known.items() if v not in (None, [], {}, "")}
            out.append((name, ", ".join(f"{k} {_plain(v)}" for k, v in shown.items())))
    return out


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _missing(result: Result) -> list[str]:
    """What was not finished, skipped, refused or not written."""
    out = (
        []
        if result.get("finished", True)
        else ["Not finished: figures are of what ran until then."]
    )
    names = {"skipped": "could not be read", "problems": "rows refused", "unwritten": "not written"}
    for key, what in names.items():
        found = [x for x in result.get(key) or () if isinstance(x, dict)]
        if found:
            shown = "; ".join(f"{x.get('where')}: {x.get('why')}" for x in found[:5])
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            out.append(f"{len(found)} {what}: {shown}{more}")
    return out


def _pictures(path: Path) -> list[Figure]:
    """The overlays beside a result file, made small enough for a page."""
    out = []
    for file in sorted(path.parent.glob(f"{path.stem}-kept*.png")):
        try:
            with Image.open(file) as image:
                small = image.convert("RGB")
        except OSError:
            continue
        small.thumbnail((1400, 4000))
        data = io.BytesIO()
        small.save(data, "JPEG", quality=85)
        text = base64.b64encode(data.getvalue()).decode()
        out.append(Figure(f"What was kept ({file.name})", picture=f"data:image/jpeg;base64,{text}"))
    return out


# ---- tables -----------------------------------------------------------------------------------

Column = tuple[str, Callable[[Row], Cell]]


def number(head: str, key: str, digits: int = 0, scale: float = 1.0, unit: str = "") -> Column:
    """A column of a field, empty where nothing was measured."""

    def cell(row: Row) -> Cell:
        value = row.get(key)
        if not isinstance(value, (int, float)):
            return Cell("")
        return Cell(f"{value * scale:.{digits}f}{unit}", value * scale)

    return head, cell


def between(head: str, key: str, digits: int = 1, scale: float = 100.0) -> Column:
    """A column of a field with its interval, ``key_low`` and ``key_high``."""

    def cell(row: Row) -> Cell:
        values = [row.get(key + end) for end in ("", "_low", "_high")]
        if values[0] is None:
            return Cell("")
        mid, low, high = (v if v is None else scale * v for v in values)
        if low is None or high is None:
            return Cell(f"{mid:.{digits}f}", mid)
        return Cell(f"{mid:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})", mid)

    return head, cell


def text(head: str, key: str) -> Column:
    """A column of text."""
    return head, lambda row: Cell("" if row.get(key) is None else rounded(str(row[key])))


def rounded(words: str) -> str:
    """Text with the long fractions in it, such as 0.2222222222222222, rounded to four digits."""
    return re.sub(r"\d*\.\d{6,}", lambda found: f"{float(found[0]):.4g}", words)


def speedup(head: str, key: str) -> Column:
    """A column of how many times as fast, from a ratio of times."""

    def cell(row: Row) -> Cell:
        ratio = row.get(key)
        return Cell(f"{1 / ratio:.2f}x", 1 / ratio) if ratio else Cell("")

    return head, cell


def table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A table of the columns that have something to say."""
    cells = [[cell(row) for _, cell in columns] for row in rows]
    used = [i for i in range(len(columns)) if any(line[i].text for line in cells)]
    strong = {
        n
        for n, row in enumerate(rows)
        if row.get("method") == "uncompressed" or row.get("is_chosen")
    }
    return Table(
        title, [columns[i][0] for i in used], [[line[i] for i in used] for line in cells], strong
    )


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


# ---- one function for each benchmark ----------------------------------------------------------

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
    inner: list[Column] = [
        (name, lambda row, key=key, name=name: _share(row.get(key, {}).get(name)))  # type: ignore[misc]
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


def _share(value: float | None) -> Cell:
    return Cell("") if value is None else Cell(f"{100 * value:.1f}", 100 * value)


ENCODER: tuple[Column, ...] = (
    text("method", "method"),
    number("asked", "asked_tokens"),
    number("kept", "final_tokens"),
    number("FLOPs %", "flops_share", 0, 100),
    number("encode ms", "encode_ms", 1),
    speedup("speed-up", "encode_ratio"),
)
DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}


def _recall(direction: str, k: str) -> Column:
    def cell(row: Row) -> Cell:
        flat = {
            f"r{end}": (row.get(f"recall{end}") or {}).get(direction, {}).get(k)
            for end in ("", "_low", "_high")
        }
        return between("", "r")[1](flat)

    return f"{DIRECTIONS[direction]} R@{k} %", cell


def _retrieval(section: Section, result: Result) -> None:
    rows = _errors(section, result["rows"])
    columns = [*ENCODER, *(_recall(d, k) for d in DIRECTIONS for k in ("1", "5", "10"))]
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
    ("pays", lambda row: Cell({True: "yes", False: "no"}.get(row.get("pays"), ""))),  # type: ignore
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
