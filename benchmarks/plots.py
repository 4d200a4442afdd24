# SPDX-License-Identifier: Apache-2.0
"""Plots of result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .rows import rows_of

CONTROLS = ("random", "uniform", "pool", "downsample")
"""Drawn in grey: what every method has to beat."""


def pareto(result: dict[str, Any], path: Path) -> Path:
    """Accuracy against FLOPs and against prefill time, one line for each method, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (the ``bench`` extra has it).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = result["rows"][0]
    names = list(dict.fromkeys(r["method"] for r in result["rows"][1:]))
    axes_of = {
        "flops_all_g": "GFLOPs (multiply-adds) of one prompt, encoder included",
        "prefill_ms": "prefill, ms (pixels to first logits, one prompt)",
    }
    axes_of = {k: v for k, v in axes_of.items() if base[k] is not None}
    figure, axes = plt.subplots(
        1, len(axes_of), figsize=(6.2 * len(axes_of), 4.6), sharey=True, squeeze=False
    )
    colours = plt.get_cmap("tab10").colors
    styles: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(n for n in names if n not in CONTROLS):
        styles[name] = {"color": colours[i % 10], "marker": "os^Dv"[i // 2 % 5], "lw": 1.8}
    for i, name in enumerate(n for n in names if n in CONTROLS):
        styles[name] = {"color": "0.55", "ls": "--", "marker": "x+1*"[i], "lw": 1.2}
    for axis, (key, label) in zip(axes[0], axes_of.items()):
        for name in names:
            rows = [r for r in rows_of(result, name) if r[key] is not None]
            if rows:
                x = [r[key] for r in rows]
                axis.plot(x, [100 * r["accuracy"] for r in rows], label=name, ms=5, **styles[name])
        axis.plot(base[key], 100 * base["accuracy"], "k*", ms=13, label="uncompressed", zorder=5)
        axis.axhline(100 * base["accuracy"], color="k", lw=0.6, alpha=0.4)
        if base["blank_accuracy"] is not None:
            axis.axhline(100 * base["blank_accuracy"], color="k", ls=":", lw=1, label="blank image")
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    low, high = axes[0][0].get_ylim()
    if high - low < 10:  # do not blow up noise
        axes[0][0].set_ylim((low + high) / 2 - 5, (low + high) / 2 + 5)
    axes[0][0].set_ylabel(f"accuracy on {result['task']}, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=9)
    figure.suptitle(f"{result['model']['name']}: {result['questions']} questions", fontsize=11)
    figure.tight_layout(rect=(0, 0, 0.88, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
