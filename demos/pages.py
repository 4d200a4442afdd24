# SPDX-License-Identifier: Apache-2.0
"""Results as the page shows them: tables and cards as HTML, the plot. All text is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from html import escape
from io import BytesIO
from typing import Any

from PIL import Image

from ..method import PLACES
from ..registry import known_methods
from .gallery import Ranking
from .results import BASELINE, COMPRESSED, ComparisonRow, Side, Snapshot
from .uploads import FORMATS, MAX_BYTES, MAX_PIXELS

ABSENT = "not measured here"
TILE = 320
"""Longer side of a picture of a sheet in pixels."""


def head(note: str) -> str:
    """Title, what the page is, and what its models know."""
    return (
        '<div class="vtc-head"><h1>vtc: visual token compression</h1><p>One question, asked with '
        "all image tokens and with a few: what is saved, what is lost, which patches stay.</p>"
        f'</div><div class="vtc-note">{escape(note)}</div>'
    )


def limits() -> str:
    """A line on the files that are taken as images."""
    kinds = ", ".join(FORMATS).replace("WEBP", "WebP")
    return (
        f'<div class="vtc-note">{kinds}, up to {MAX_BYTES >> 20} MB and '
        f"{MAX_PIXELS // 10**6} megapixels</div>"
    )


def status(text: str, kind: str = "") -> str:
    """A line on what happens; ``kind`` is "", "busy" or "bad"."""
    role = "alert" if kind == "bad" else "status"
    return f'<div class="vtc-status {kind}" role="{role}">{escape(text)}</div>'


def about(names: Sequence[str]) -> str:
    """Summaries of the chosen methods, with their stages."""
    known = known_methods()
    lines = []
    for name in names:
        stages = known[name]().stages
        where = ", ".join(text for stage, text in PLACES.items() if stage in stages)
        summary = escape(known[name].summary)
        lines.append(f"<p><b>{escape(name)}</b> ({escape(where)}): {summary}</p>")
    if len(names) > 1:
        lines.append(
            "<p>A chain: the slider is what the last one leaves, those before it take equal shares "
            "of the way.</p>"
        )
    return f'<div class="vtc-note">{"".join(lines)}</div>'


def outcome(answer: Snapshot) -> str:
    """The status line of an answer."""
    if not answer.done:
        return status(answer.status, "busy")
    before, after = answer.sides[BASELINE], answer.sides[COMPRESSED]
    text = "the same answer" if before.text == after.text else "another answer"
    text += f" with {after.tokens:g} of {before.tokens:g} image tokens"
    if before.kv_bytes and after.kv_bytes:
        text += f" and {100 * after.kv_bytes / before.kv_bytes:.0f} % of the KV cache"
    return status(f"done: {text}")


def card(name: str, side: Side) -> str:
    """One answer."""
    tokens = "" if side.tokens is None else f", {side.tokens:g} image tokens"
    kind = "before" if name == BASELINE else "after"
    return (
        f'<div class="vtc-card {kind}"><div class="who">{escape(name.capitalize())}'
        f'{escape(tokens)}</div><div class="said">{escape(side.text)}</div></div>'
    )


def _bytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value < 1e4 else f"{value / 1e3:.1f} s"


def _less(before: float, after: float) -> str:
    return "same" if before == after else f"{100 * (after / before - 1):+.0f} %"


def _faster(before: float, after: float) -> str:
    ratio = before / after
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


FIGURES: tuple[tuple[str, str, Callable[[float], str], Callable[[float, float], str]], ...] = (
    ("image tokens, last layer", "tokens", "{:g}".format, _less),
    ("image tokens, mean over layers", "average", "{:.1f}".format, _less),
    ("time to first token", "first_ms", _ms, _faster),
    ("total time", "total_ms", _ms, _faster),
    ("answer tokens", "new_tokens", "{:g}".format, _less),
    ("peak memory", "peak_bytes", _bytes, _less),
    ("KV cache", "kv_bytes", _bytes, _less),
)


def figures(answer: Snapshot, rounds: int) -> str:
    """The numbers of both sides, and how they were taken."""
    before, after = answer.sides[BASELINE], answer.sides[COMPRESSED]
    rows = []
    for label, name, show, change in FIGURES:
        values = [getattr(side, name) for side in (before, after)]
        absent = ABSENT if answer.done else "..."
        cells = [
            f'<td class="absent">{absent}</td>' if v is None else f"<td>{show(v)}</td>"
            for v in values
        ]
        known = None not in values and values[0] and values[1]
        cells.append(f"<td>{change(*values) if known else ''}</td>")
        rows.append(f"<tr><td>{label}</td>{''.join(cells)}</tr>")
    return (
        '<div class="vtc-box"><table class="vtc"><thead><tr><th></th><th>uncompressed</th>'
        f"<th>compressed</th><th>change</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f'<div class="vtc-note"><p>{_times(rounds)}</p><p>Peak memory: tensors that torch held at '
        "the fullest moment, above weights and inputs; not the memory of the process.</p>"
        "</div></div>"
    )


def _times(rounds: int) -> str:
    if not rounds:
        return "No times: the number of timed rounds is 0."
    return (
        f"Times: medians of {rounds} rounds on the same prompt, in random order in each; the first "
        "answers are the warm-up and are not counted. From pixels on the device to the token."
    )


def comparison(rows: Sequence[ComparisonRow], rounds: int) -> str:
    """Several methods in a table; a method that could not run with its reason."""
    if not rows:
        return ""
    base = rows[0].side
    lines = []
    for i, row in enumerate(rows):
        name = f"<td>{escape(row.name)}</td>"
        if row.error:
            lines.append(f'<tr>{name}<td class="why" colspan="5">{escape(row.error)}</td></tr>')
            continue
        side = row.side
        numbers = (
            f"{side.tokens:g}",
            f"{100 * side.flops / base.flops:.0f}" if side.flops and base.flops else "",
            "" if side.first_ms is None else f"{side.first_ms:.0f}",
            "" if side.kv_bytes is None else f"{side.kv_bytes / 1e6:.2f}",
        )
        cells = "".join(f"<td>{n}</td>" for n in numbers)
        kind = ' class="first"' if i == 0 else ""
        said = f'<td class="answer">{escape(side.text)}</td>'
        lines.append(f"<tr{kind}>{name}{said}{cells}</tr>")
    names = ("tokens", "LLM FLOPs, %", "first token, ms", "KV cache, MB")
    heads = "".join(f"<th>{name}</th>" for name in names)
    return (
        '<div class="vtc-box"><table class="vtc"><thead><tr><th>method</th>'
        f'<th class="left">answer</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        f'<div class="vtc-note"><p>{_times(rounds)}</p><p>LLM FLOPs are those for image tokens; '
        "tokens are those in the last layer.</p></div></div>"
    )


def plot(rows: Sequence[ComparisonRow]) -> Any:
    """FLOPs and time to first token of each method, in % of the uncompressed model."""
    from matplotlib.figure import Figure

    base, ran = rows[0].side, [row for row in rows[1:] if row.side.flops]
    bars: tuple[tuple[str, str, str], ...] = (
        ("flops", "LLM FLOPs (image tokens)", "#9aa5b1"),
        ("first_ms", "time to first token", "#0f8b8d"),
    )
    figure = Figure(figsize=(4.6, 1.1 + 0.42 * max(1, len(ran))), dpi=160, layout="constrained")
    axes = figure.subplots()
    for k, (name, label, colour) in enumerate(bars):
        whole = getattr(base, name)
        shares = [100 * (getattr(row.side, name) or 0) / whole if whole else 0 for row in ran]
        places = [i + 0.36 * (k - 0.5) for i in range(len(ran))]
        drawn = axes.barh(places, shares, height=0.34, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.0f", padding=2, fontsize=7, color="#555")
    axes.axvline(100, color="#333", linewidth=0.8)
    axes.set_yticks(range(len(ran)), [row.name for row in ran], fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("% of uncompressed (less is better)", fontsize=8)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", fontsize=7, frameon=False, ncols=2)
    return figure


def ranking(found: dict[str, Ranking], described: int | None, shown: int) -> str:
    """Table of the ranking before and after; ``described`` is the scene that the text is of."""
    before, after = found[BASELINE], found[COMPRESSED]
    size = len(before.order)
    same = len(set(before.order[:shown]) & set(after.order[:shown]))
    rows: list[tuple[str, ...]] = [
        ("patch tokens behind the encoder", f"{before.tokens:g}", f"{after.tokens:g}"),
        ("encoder, for an image", _ms(before.ms_per_image), _ms(after.ms_per_image)),
        ("captions that find their own scene", f"{before.hits}/{size}", f"{after.hits}/{size}"),
    ]
    if described is not None:
        ranks = [str(side.order.index(described) + 1) for side in (before, after)]
        rows.insert(0, ("rank of the described scene", *ranks))
    rows.append((f"the same among the first {shown}", "", f"{same}/{shown}"))
    lines = "".join(f"<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows)
    return (
        '<div class="vtc-box"><table class="vtc"><thead><tr><th></th><th>uncompressed</th>'
        f"<th>compressed</th></tr></thead><tbody>{lines}</tbody></table>"
        '<div class="vtc-note"><p>Times: medians over the gallery, taken when it was first encoded '
        "with these settings.</p></div></div>"
    )


def sheet(title: str, tiles: Iterable[tuple[Image.Image, str]]) -> str:
    """Captioned pictures side by side; they are part of the page, no files."""
    figures_ = []
    for picture, caption in tiles:
        small = picture.copy()
        small.thumbnail((TILE, TILE))
        raw = BytesIO()
        small.save(raw, "WEBP", quality=90)
        data = b64encode(raw.getvalue()).decode()
        text = escape(caption)
        figures_.append(
            f'<figure><img src="data:image/webp;base64,{data}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return (
        f'<div class="vtc-box"><div class="vtc-title">{escape(title)}</div>'
        f'<div class="vtc-sheet">{"".join(figures_)}</div></div>'
    )
