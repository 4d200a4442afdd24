# SPDX-License-Identifier: Apache-2.0
"""Plots of result files: Pareto fronts of quality against cost, and calibration curves.

Each drawing takes axes, so that the runner's PNG files and the report's inline SVG share it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONTROLS = ("random", "uniform", "pool", "downsample")
"""Drawn in grey: what every method has to beat."""
FEW = 8
"""As many methods get a line in colour; of more, those on the front."""

Row = dict[str, Any]
Quality = Callable[[Row], float | None]
Draw = Callable[[Any], None]

COSTS = {
    "final_tokens": "visual tokens at the end",
    "flops_all_g": "GFLOPs (multiply-adds) of one prompt, encoder included",
    "prefill_ms": "prefill, ms (pixels to first logits, one prompt)",
    "flops_share": "share of the FLOPs",
    "encode_ms": "ms of a batch of images",
}
"""What methods may cost, by the field of a row."""


def optimal(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the Pareto-optimal ones of (cost, quality), by rising cost.

    None is as good at a lower cost, or better at the same. Of equal points the first counts.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def accuracy(row: Row) -> float | None:
    """Accuracy in percent."""
    value = row.get("accuracy")
    return None if value is None else 100 * value


def points_of(rows: Sequence[Row], cost: str, quality: Quality) -> list[Row]:
    """The rows that have both coordinates."""
    return [r for r in rows if r.get(cost) is not None and quality(r) is not None]


def front_of(rows: Sequence[Row], cost: str, quality: Quality = accuracy) -> list[Row]:
    """The Pareto-optimal rows, by rising cost."""
    known = points_of(rows, cost, quality)
    return [known[i] for i in optimal([(r[cost], quality(r)) for r in known])]  # type: ignore


def names_of(rows: Sequence[Row], costs: Sequence[str], quality: Quality = accuracy) -> list[str]:
    """The methods that get a colour: all if they are few, else controls and those on a front."""
    names = list(dict.fromkeys(r["method"] for r in rows[1:]))
    if len(names) <= FEW:
        return names
    best = {r["method"] for cost in costs for r in front_of(rows, cost, quality)}
    return [n for n in names if n in best or n in CONTROLS]


def draw_front(
    axis: Any,
    rows: Sequence[Row],
    cost: str,
    names: Sequence[str],
    quality: Quality = accuracy,
    label: str = "accuracy, %",
) -> None:
    """Quality against one cost: a line for each method, the optimal points ringed and joined.

    Args:
        rows: of a result, the stock model first.
        cost: a field of `COSTS`; label: of the quality, with its unit.
        names: the methods that get a colour (`names_of`); the others are grey dots.
    """
    known, front, base = points_of(rows, cost, quality), front_of(rows, cost, quality), rows[0]
    others = [r for r in known if r["method"] not in names and r is not base]
    if others:
        axis.plot(
            [r[cost] for r in others],
            [quality(r) for r in others],
            ls="",
            marker=".",
            color="0.6",
            ms=5,
            alpha=0.6,
            label="others",
        )
    for name, style in _styles(names).items():
        line = sorted((r for r in known if r["method"] == name), key=lambda r: r[cost])
        if line:
            x, y = [r[cost] for r in line], [quality(r) for r in line]
            axis.plot(x, y, label=name, ms=5, **style)
    step = [r[cost] for r in front], [quality(r) for r in front]
    axis.step(*step, where="post", color="k", lw=0.8, ls=":", zorder=1)
    axis.plot(
        *step,
        ls="",
        marker="o",
        ms=10,
        mfc="none",
        mec="k",
        mew=1.0,
        label="Pareto-optimal",
    )
    if base in known:
        axis.plot(
            base[cost], quality(base), "k*", ms=12, label="uncompressed", zorder=5, clip_on=False
        )
    if base.get("blank_accuracy") is not None and quality is accuracy:
        blank = 100 * base["blank_accuracy"]
        axis.axhline(blank, color="k", ls="--", lw=0.8, label="blank image")
    axis.set_xlabel(COSTS[cost])
    axis.set_ylabel(label)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.25)
    low, high = axis.get_ylim()
    if high - low < 12:  # percent; do not blow up noise
        axis.set_ylim((low + high) / 2 - 5, min((low + high) / 2 + 5, 101))


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    from matplotlib import colormaps

    colours: Any = colormaps["tab10"]
    methods = [n for n in names if n not in CONTROLS]
    out: dict[str, dict[str, Any]] = {
        name: {"color": colours(i % 10), "marker": "s^Dvo"[i // 2 % 5], "lw": 1.8}
        for i, name in enumerate(methods)
    }
    for i, name in enumerate(n for n in names if n in CONTROLS):
        out[name] = {"color": "0.5", "ls": "--", "marker": "x+1*"[i], "lw": 1.2}
    return out


def pareto(result: dict[str, Any], path: Path) -> Path:
    """Accuracy against tokens, FLOPs and prefill time, one line for each method, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (the ``bench`` extra has it).
    """
    rows = [r for r in result["rows"] if r["error"] is None]
    costs = [c for c in ("final_tokens", "flops_all_g", "prefill_ms") if rows[0][c] is not None]
    with _figure(1, len(costs)) as (figure, axes):
        names = names_of(rows, costs)
        for axis, cost in zip(axes[0], costs):
            draw_front(axis, rows, cost, names, label=f"accuracy on {result['task']}, %")
        _legend_below(figure, *axes[0])
        title = f"{result['model']['name']}: {result['questions']} questions"
        figure.suptitle(title, fontsize=11)
        return _save(figure, path)


# ---- calibration ------------------------------------------------------------------------------


def draw_divergence(axis: Any, row: Row) -> None:
    """Divergence and its bounds against the tokens kept, with the limit and the chosen budget."""
    curve = sorted(row["curve"], key=lambda p: p["final_tokens"])
    x = [p["final_tokens"] for p in curve]
    axis.fill_between(x, [p["kl_low"] for p in curve], [p["kl_high"] for p in curve], alpha=0.2)
    axis.plot(x, [p["kl_high"] for p in curve], "C0^-", lw=1, ms=4, label="95 % upper bound")
    axis.plot(x, [p["kl"] for p in curve], "C0o-", ms=4, label="mean of the samples")
    axis.axhline(row["max_divergence"], color="C3", lw=1.2, ls="--", label="limit")
    axis.set_ylabel("divergence, nats")
    _tokens(axis, row, x)


def draw_loss(axis: Any, row: Row) -> None:
    """What held-out questions lost, with 95 % intervals, beside what was promised."""
    held = {h["keep_ratio"]: h for h in row.get("held_out", ())}
    curve = sorted(row["curve"], key=lambda p: p["final_tokens"])
    x = [p["final_tokens"] for p in curve]
    for key, label, style in (
        ("promised_loss", "promised (greedy answers)", "C2^-"),
        ("promised_shift", "promised (Pinsker)", "C1v:"),
    ):
        axis.plot(x, [100 * p[key] for p in curve], style, lw=1, ms=4, label=label)
    known = [(p["final_tokens"], held[p["keep_ratio"]]) for p in curve if p["keep_ratio"] in held]
    if known:
        y = [100 * h["loss"] for _, h in known]
        spread = [
            [v - 100 * h["loss_low"] for v, (_, h) in zip(y, known)],
            [100 * h["loss_high"] - v for v, (_, h) in zip(y, known)],
        ]
        at = [tokens for tokens, _ in known]
        axis.errorbar(at, y, spread, fmt="ko-", ms=4, lw=1.5, capsize=2, label="lost, held-out")
    axis.set_ylabel("accuracy lost, points")
    _tokens(axis, row, x)


def _tokens(axis: Any, row: Row, x: Sequence[float]) -> None:
    axis.axvline(row["chosen"]["final_tokens"], color="C3", lw=1, label="chosen")
    axis.set_xscale("log", base=2)
    axis.set_xticks([])
    axis.set_xticks([], minor=True)
    shown: list[float] = []
    for value in sorted(x, reverse=True):
        if not shown or shown[-1] / max(value, 1e-9) > 1.6:
            shown.append(value)
    axis.set_xticks(shown, [f"{value:.0f}" for value in shown])
    axis.set_xlabel("visual tokens at the end")
    axis.grid(alpha=0.25)


def calibration_plot(result: dict[str, Any], path: Path) -> Path:
    """Divergence and loss of every calibrated method, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (the ``bench`` extra has it).
        ValueError: no method was calibrated.
    """
    rows = [row for row in result["rows"] if row["error"] is None]
    if not rows:
        raise ValueError(f"no method could be calibrated on {result['task']}")
    with _figure(2, len(rows), 3.6, 2.9) as (figure, axes):
        for column, row in enumerate(rows):
            draw_divergence(axes[0][column], row)
            draw_loss(axes[1][column], row)
            axes[0][column].set_title(row["method"], fontsize=10)
        for line in axes:
            for axis in line[1:]:
                axis.sharey(line[0])
        _legend_below(figure, axes[0][0], axes[1][0])
        return _save(figure, path)


# ---- figures ----------------------------------------------------------------------------------


@contextmanager
def _figure(
    rows: int, columns: int, width: float = 5.0, height: float = 3.9
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes [row][column]; text is text, "$" included."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "vtc"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


def _legend_below(figure: Any, *axes: Any) -> None:
    """One legend for all axes; an entry that comes twice is shown once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    wide = figure.get_size_inches()[0]
    columns = max(1, int(wide // 1.9))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def svg(*drawings: Draw, width: float = 5.0, height: float = 4.4) -> str:
    """Drawings side by side as SVG for the inside of an HTML page: nothing to load.

    Black is the colour of the page's text, so that it fits a light and a dark page.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (the ``bench`` extra has it).
    """
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    out = io.StringIO()
    with _figure(1, len(drawings), width, height) as (figure, axes):
        for axis, draw in zip(axes[0], drawings):
            draw(axis)
        _legend_below(figure, *axes[0])
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]  # without the XML head and the DTD
    text = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", text.split(">", 1)[0]) + (
        ">" + text.split(">", 1)[1]
    )
    return text.replace("#000000", "currentColor")
