# SPDX-License-Identifier: Apache-2.0
"""Results of `vtc speed` as tables and in words: what was measured, and where it does not pay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TEXT_ALONE = "(text alone)"
Row = dict[str, Any]
Part = dict[str, Any]


def _number(key: str, form: str, factor: float = 1.0, unit: str = "") -> Callable[[Row], str]:
    """A cell that shows a field, empty where nothing was measured."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else format(factor * value, form) + unit

    return cell


def _ms(key: str) -> Callable[[Row], str]:
    """A time, with one digit behind the point where it is short."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else f"{value:.{int(value < 99.95)}f}"

    return cell


def _within(row: Row) -> str:
    """Half of the way from the 20th to the 80th percentile, of the median."""
    low, middle, high = (row.get(f"ttft_ms{end}") for end in ("_low", "", "_high"))
    return "" if None in (low, middle, high) else f"{50 * (high - low) / middle:.0f}"  # type: ignore


def _kv(row: Row) -> str:
    held, said = row.get("kv_bytes_held"), row.get("kv_bytes_reported")
    differs = "" if said in (None, held) else f" ({said / 1e6:.1f} reported)"
    return "" if held is None else f"{held / 1e6:.1f}{differs}"


def _pays(row: Row) -> str:
    return {None: "", True: "yes", False: "no"}[row.get("pays")]


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("\nmethod", lambda row: short(row["method"])),
    ("FLOPs\n%", _number("flops_share", ".0f", 100)),
    ("first\nms", _ms("ttft_ms")),
    ("\n±%", _within),
    ("\ngain", _number("ttft_speedup", ".2f", 1, "x")),
    ("vision\nms", _ms("vision_ms")),
    ("select\nms", _ms("method_ms")),
    ("LLM\nms", _ms("llm_prefill_ms")),
    ("token\nms", _ms("decode_ms")),
    ("\ngain", _number("decode_speedup", ".2f", 1, "x")),
    ("tokens\n/s", _number("tokens_per_second", ".0f")),
    ("answer\ngain", _number("answer_speedup", ".2f", 1, "x")),
    ("KV\nMB", _kv),
    ("peak\nMB", _number("peak_bytes", ".0f", 1e-6)),
    ("\npays", _pays),
)
"""Heading of two lines, and cell. "first" is the first token, "token" each one that is decoded."""


def short(method: str) -> str:
    """A method without its parameters; `notes` says what stands behind "(text alone)"."""
    return TEXT_ALONE if method.startswith("(") else method.split("(")[0]


def table(part: Part) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a part, without rows and columns that are empty."""
    rows = [row for row in part["rows"] if row["rounds"]]
    columns = [(name, cell) for name, cell in COLUMNS if any(map(cell, rows))]
    return [name for name, _ in columns], [[cell(row) for _, cell in columns] for row in rows]


def notes(part: Part) -> list[str]:
    """What the table of a part leaves out: errors, and whether all ran the same kernels."""
    out = [] if part["error"] is None else [f"not measured: {part['error']}"]
    for row in part["rows"]:
        if row["error"] is not None:
            after = f", ended after {row['rounds']} rounds" if row["rounds"] else ", not timed"
            out.append(f"{short(row['method'])}{after}: {row['error']}")
        if short(row["method"]) == TEXT_ALONE:
            out.append(f"{TEXT_ALONE}: {row['method'].strip('()')}; what could be had at all")
    known = [row for row in part["rows"] if row["kernels"] is not None]
    if known:
        used = ", ".join(sorted(set(part["attention"].values())))
        out.append(f"attention: {used}, {_kernels(known[0])}")
        others = [row for row in known if row["same_kernels"] is False]
        out += [f"other kernels: {short(row['method'])} {_kernels(row)}" for row in others]
    return out


def _kernels(row: Row) -> str:
    names = (name.removeprefix("aten::_scaled_dot_product_") for name in row["kernels"])
    return " and ".join(names) or "no fused kernel"


# ---- where it does not pay -----------------------------------------------------------------------


def losses(parts: list[Part]) -> list[dict[str, Any]]:
    """Each method and part where the method does not pay, with a sentence that says so."""
    return [
        {
            "method": row["method"],
            **{k: part[k] for k in ("title", "shape", "batch", "text_tokens", "image_tokens")},
            **{k: row[k] for k in ("ttft_speedup", "answer_speedup", "kv_share")},
            "words": _sentence(part, row),
        }
        for part in parts
        for row in part["rows"]
        if row["pays"] is False
    ]


def _sentence(part: Part, row: Row) -> str:
    said = [f"the first token {_gain(row['ttft_speedup'])}"]
    if row["answer_speedup"] is not None:
        answer = f"the whole answer of {part['decode_tokens'] + 1} tokens"
        said.append(f"{answer} {_gain(row['answer_speedup'])}")
    share = row["kv_share"]
    saved = "" if share is None else f"; the KV cache is {100 * share:.0f} % of the stock one"
    return f"{short(row['method'])} on {part['title']}: {', '.join(said)}{saved}"


def _gain(ratio: float) -> str:
    return f"{ratio:.2f}x as fast"


def verdicts(result: dict[str, Any]) -> list[str]:
    """One sentence a method: where it pays and where it does not."""
    out = []
    parts = [part for part in result["parts"] if not part["compiled"]]
    names = dict.fromkeys(
        short(row["method"]) for part in parts for row in part["rows"] if row["pays"] is not None
    )
    for name in names:
        found = [
            (part, row)
            for part in parts
            for row in part["rows"]
            if short(row["method"]) == name and row["pays"] is not None
        ]
        bad = [f"{heading(part)} ({gains(row)})" for part, row in found if not row["pays"]]
        where = f"; not at {'; '.join(bad)}" if bad else ""
        out.append(f"{name} pays in {len(found) - len(bad)} of {len(found)} cases{where}")
    return out


def grid(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of "where does it pay": methods down, parts across.

    A cell has the speed-ups of the first token and of the whole answer; a cross where the method
    does not pay, a dash where it was not measured.
    """
    parts = [part for part in result["parts"] if not part["compiled"]]
    known = [row for part in parts for row in part["rows"] if row["pays"] is not None]
    names = dict.fromkeys(short(row["method"]) for row in known)
    cell_of = {
        (i, short(row["method"])): row for i, part in enumerate(parts) for row in part["rows"]
    }

    def cell(i: int, name: str) -> str:
        row = cell_of.get((i, name))
        if row is None or row["pays"] is None:
            return "-"
        return gains(row) if row["pays"] else f"{gains(row)} ✗"

    head = ["method", *map(heading, parts)]
    return head, [[name, *(cell(i, name) for i in range(len(parts)))] for name in names]


def gains(row: Row) -> str:
    """Speed-ups of the first token and of the whole answer."""
    both = [row[f"{k}_speedup"] for k in ("ttft", "answer")]
    return " / ".join(f"{gain:.2f}x" for gain in both if gain is not None)


def heading(part: Part) -> str:
    """A part in few words."""
    images = f" {part['images']} images," if part["images"] > 1 else ""
    text = f"{images} {part['text_tokens']} text" if part["text_tokens"] else " encoder"
    return f"{part['shape']}, batch {part['batch']},{text}"


# ---- for docs/speed.md ---------------------------------------------------------------------------

OVERVIEW = (
    ("tokens at the end", _number("final_tokens", ".0f")),
    ("FLOPs %", _number("flops_share", ".0f", 100)),
    ("LLM FLOPs %", _number("llm_flops_share", ".0f", 100)),  # up to version 0.1
    ("choosing, ms", _number("method_ms", ".0f")),
    ("first token", _number("ttft_speedup", ".2f", 1, "x")),
    ("decode, ms a token", _number("decode_ms", ".1f")),
    ("decode", _number("decode_speedup", ".2f", 1, "x")),
    ("whole answer", _number("answer_speedup", ".2f", 1, "x")),
    ("KV %", _number("kv_share", ".0f", 100)),
    ("peak MB", _number("peak_bytes", ".0f", 1e-6)),
)


def overview(result: dict[str, Any]) -> str:
    """A Markdown table for docs/speed.md: of a sweep where it pays, else the last part that is no
    compiled one."""
    if result["settings"].get("sweep"):
        return _sweep_overview(result)
    part = current([part for part in result["parts"] if "compiled" not in part["title"]][-1])
    stock, *rows = part["rows"]
    columns = [(name, cell) for name, cell in OVERVIEW if any(cell(row) for row in (stock, *rows))]
    rows.sort(key=lambda row: -(row["ttft_speedup"] or 0))
    table = [["method", *(name for name, _ in columns)]]
    for row in rows:
        if row["error"] is None:
            name = row["method"]
            shown = name if name.startswith("(") else f"`{short(name)}`"
            table.append([shown, *(cell(row) for _, cell in columns)])
    said = [part["title"]]
    if part.get("image_tokens"):
        said.append(f"{part['image_tokens']} image tokens")
    if stock["ttft_ms"] is not None:
        said.append(f"stock model: first token {stock['ttft_ms']:.0f} ms")
    if stock.get("decode_ms") is not None:
        said.append(f"then {part['decode_tokens']} of {stock['decode_ms']:.1f} ms each")
    lines = [_markdown(table), "", f"{', '.join(said)}."]
    lines += [
        f"* {short(row['method'])}: {row['error']}" for row in rows if row["error"] is not None
    ]
    return "\n".join(lines)


def _sweep_overview(result: dict[str, Any]) -> str:
    head, rows = grid(result)
    table = [head, *([f"`{name}`", *cells] for name, *cells in rows)]
    said = f"First token / whole answer, times as fast. Without a cross, {result['rule']}."
    return "\n".join([_markdown(table), "", said])


def _markdown(table: list[list[str]]) -> str:
    head, *rows = ("| " + " | ".join(cells) + " |" for cells in table)
    return "\n".join([head, "|---|" + "---:|" * (len(table[0]) - 1), *rows])


def current(part: Part) -> Part:
    """A part as `vtc speed` writes it today, from one that it wrote up to version 0.1."""
    if "compiled" in part:
        return part
    timed = [row for row in part["rows"] if "whole_measured" in row]
    refused = [row["method"].split(": ", 1) for row in part["rows"] if "ms" not in row]
    stock = {"method": "uncompressed", "error": None, "ttft_ms": timed[0]["whole_stock_ms"]}
    rows = [
        {
            **{k: row[k] for k in ("method", "final_tokens", "method_ms")},
            "llm_flops_share": row["flops_share"],
            "ttft_ms": row["whole_ms"],
            "ttft_speedup": row["whole_measured"],
            "kv_share": row["kv_bytes_reported"] / row["kv_bytes_stock"]
            if row["kv_bytes_stock"]
            else None,
            "error": None,
        }
        for row in timed
    ]
    rows += [{"method": name, "error": why, "ttft_speedup": None} for name, why in refused]
    return {"title": part["title"], "compiled": False, "rows": [stock, *rows]}
