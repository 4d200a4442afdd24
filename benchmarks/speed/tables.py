# SPDX-License-Identifier: Apache-2.0
"""Results of `vtc speed` as tables and in words: what was measured, and where it does not pay."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..shared.columns import Align, Column, Table, fill, markdown, measured, number, used, words

TEXT_ALONE = "(text alone)"
Row = dict[str, Any]
Part = dict[str, Any]


def _ms(title: str, key: str) -> Column:
    """A column of a time, with one digit behind the point where it is short."""
    return measured(title, lambda row: row.get(key), lambda ms: f"{ms:.{int(ms < 99.95)}f}")


def _within(row: Row) -> str:
    """Half of the way from the 20th to the 80th percentile, of the median."""
    low, middle, high = (row.get(f"ttft_ms{end}") for end in ("_low", "", "_high"))
    return "" if None in (low, middle, high) else f"{50 * (high - low) / middle:.0f}"  # type: ignore


def _kv(row: Row) -> str:
    held, said = row.get("kv_bytes_held"), row.get("kv_bytes_reported")
    differs = "" if said in (None, held) else f" ({said / 1e6:.1f} reported)"
    return "" if held is None else f"{held / 1e6:.1f}{differs}"


def pays(title: str, align: Align = "left") -> Column:
    """A column of whether a method pays."""
    return words(title, lambda row: {True: "yes", False: "no"}.get(row.get("pays"), ""), align)


COLUMNS: tuple[Column, ...] = (
    words("\nmethod", lambda row: short(row["method"])),
    number("FLOPs\n%", "flops_share", 0, 100),
    _ms("first\nms", "ttft_ms"),
    words("\n±%", _within, "right"),
    number("\ngain", "ttft_speedup", 2, 1, "x"),
    _ms("vision\nms", "vision_ms"),
    _ms("select\nms", "method_ms"),
    _ms("LLM\nms", "llm_prefill_ms"),
    _ms("token\nms", "decode_ms"),
    number("\ngain", "decode_speedup", 2, 1, "x"),
    number("tokens\n/s", "tokens_per_second"),
    number("answer\ngain", "answer_speedup", 2, 1, "x"),
    words("KV\nMB", _kv, "right"),
    number("peak\nMB", "peak_bytes", 0, 1e-6),
    pays("\npays", "right"),
)
"""Titles of two lines. "first" is the first token, "token" each one that is decoded."""


def short(method: str) -> str:
    """A method without its parameters; `notes` says what stands behind "(text alone)"."""
    return TEXT_ALONE if method.startswith("(") else method.split("(")[0]


def table(part: Part) -> Table:
    """A part, without rows and columns that are empty."""
    rows = [row for row in part["rows"] if row["rounds"]]
    return fill(used(COLUMNS, rows), rows, part["title"])


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


def grid(result: dict[str, Any], mark: str = "") -> Table:
    """The table "where does it pay": methods down, each between marks, parts across.

    A cell has the speed-ups of the first token and of the whole answer; a cross where the method
    does not pay, a dash where it was not measured.
    """
    parts = [part for part in result["parts"] if not part["compiled"]]
    known = [row for part in parts for row in part["rows"] if row["pays"] is not None]
    names = dict.fromkeys(short(row["method"]) for row in known)

    def cell(row_of: dict[str, Row], name: str) -> str:
        row = row_of.get(name)
        if row is None or row["pays"] is None:
            return "-"
        return gains(row) if row["pays"] else f"{gains(row)} ✗"

    columns = [words("method", lambda name: f"{mark}{name}{mark}")]
    for part in parts:
        row_of = {short(row["method"]): row for row in part["rows"]}
        columns.append(words(heading(part), partial(cell, row_of), "right"))
    title = "Times as fast as the stock model: first token / whole answer"
    return fill(columns, names, title)


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
    number("tokens at the end", "final_tokens"),
    number("FLOPs %", "flops_share", 0, 100),
    number("LLM FLOPs %", "llm_flops_share", 0, 100),  # up to version 0.1
    number("choosing, ms", "method_ms"),
    number("first token", "ttft_speedup", 2, 1, "x"),
    number("decode, ms a token", "decode_ms", 1),
    number("decode", "decode_speedup", 2, 1, "x"),
    number("whole answer", "answer_speedup", 2, 1, "x"),
    number("KV %", "kv_share", 0, 100),
    number("peak MB", "peak_bytes", 0, 1e-6),
)


def _marked(row: Row) -> str:
    name = str(row["method"])
    return name if name.startswith("(") else f"`{short(name)}`"


def overview(result: dict[str, Any]) -> str:
    """A Markdown table for docs/speed.md: of a sweep where it pays, else the last part that is no
    compiled one."""
    if result["settings"].get("sweep"):
        return _sweep_overview(result)
    part = current([part for part in result["parts"] if "compiled" not in part["title"]][-1])
    stock, *rows = part["rows"]
    rows.sort(key=lambda row: -(row["ttft_speedup"] or 0))
    columns = [words("method", _marked), *used(OVERVIEW, [stock, *rows])]
    table = fill(columns, [row for row in rows if row["error"] is None])
    said = [part["title"]]
    if part.get("image_tokens"):
        said.append(f"{part['image_tokens']} image tokens")
    if stock["ttft_ms"] is not None:
        said.append(f"stock model: first token {stock['ttft_ms']:.0f} ms")
    if stock.get("decode_ms") is not None:
        said.append(f"then {part['decode_tokens']} of {stock['decode_ms']:.1f} ms each")
    lines = [markdown(table), "", f"{', '.join(said)}."]
    lines += [
        f"* {short(row['method'])}: {row['error']}" for row in rows if row["error"] is not None
    ]
    return "\n".join(lines)


def _sweep_overview(result: dict[str, Any]) -> str:
    said = f"First token / whole answer, times as fast. Without a cross, {result['rule']}."
    return "\n".join([markdown(grid(result, "`")), "", said])


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
