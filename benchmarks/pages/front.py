# SPDX-License-Identifier: Apache-2.0
"""The front page's numbers: three of them, and a table of ten rows, from the result files.

python -m vtc.benchmarks.pages.front    writes them into README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..accuracy.tables import margin
from ..shared.columns import fill, markdown, words
from ..shared.markdown import fill_block
from ..shared.method_table import method_rows
from ..shared.names import BASELINE

RESULTS = Path("benchmarks/results")
LEADER = "fastv"
"""The method of the three numbers."""
SHOWN = (
    LEADER,
    "pyramiddrop",
    "sparsevlm",
    "divprune",
    "visionzip",
    "pitome",
    "prefixkv",
    "downsample",
    "random",
)
"""Methods of the table: of each place in a model, and two controls."""
SHARE = 2 / 9
"""Of the tokens that are left in every column."""


def read(name: str, root: Path = Path()) -> Any:
    """A result file by its stem."""
    return json.loads((root / RESULTS / f"{name}.json").read_text("utf-8"))


def at_share(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a `vtc bench` result at `SHARE` of the tokens, by method; the stock model's."""
    tokens = round(result["visual_tokens"] * SHARE)
    rows = {r["method"]: r for r in result["rows"] if r["asked_tokens"] == tokens}
    return {**rows, BASELINE: result["rows"][0]}


def timed(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the last part of a `vtc speed` result, by method."""
    return {r["method"].split("(")[0]: r for r in result["parts"][-1]["rows"]}


def numbers(root: Path = Path()) -> str:
    """Three measured numbers in Markdown, with what they are of."""
    speed, scenes = read("speed-all-h100", root), read("scenes", root)
    part, row = speed["parts"][-1], timed(speed)[LEADER]
    found, stock = at_share(scenes)[LEADER], scenes["rows"][0]
    tokens = f"{row['final_tokens']:.0f} of {part['image_tokens']} image tokens"
    shape = f"{part['title'].split(',')[0]}, {part['batch']} prompts at once, {part['dtype']}"
    gpu = speed["machine"]["gpu"].split(" 80GB")[0]
    size = f"{scenes['model']['parameters_m']:.0f} M parameters"
    lines = [
        f"| **{row['ttft_speedup']:.2f}x** | as fast to the first token: {LEADER}, {tokens}, "
        f"{shape}, {gpu} |",
        f"| **{100 * row['kv_share']:.0f} %** | of the KV cache in memory, in the same run |",
        f"| **{100 * found['accuracy']:.1f} %** | right, {100 * stock['accuracy']:.1f} % without "
        f"compression: {LEADER}, {found['final_tokens']:.0f} of {scenes['visual_tokens']} tokens, "
        f"{scenes['questions']} questions of `scenes`, the embedded model of {size} |",
    ]
    return "\n".join(["| measured | |", "|---:|---|", *lines])


def table(root: Path = Path()) -> str:
    """A table of ten rows in Markdown: accuracy, FLOPs, time and memory at `SHARE`."""
    scenes, text, speed = (read(n, root) for n in ("scenes", "small-text", "speed-all-h100"))
    where = {row["name"]: row["acts"] for row in method_rows()}
    one, two, three = at_share(scenes), at_share(text), timed(speed)
    gain = {name: row.get("ttft_speedup") or 1 for name, row in three.items()}
    held = {name: row.get("kv_share") or 1 for name, row in three.items()}
    columns = [
        words("method", lambda name: f"`{name}`" if name in where else name),
        words("acts", lambda name: where.get(name, "")),
        words("scenes", lambda name: margin(one[name]), "right"),
        words("small-text", lambda name: margin(two[name]), "right"),
        words("LLM FLOPs", lambda name: f"{100 * one[name]['flops_share']:.0f} %", "right"),
        words("first token", lambda name: f"{gain[name]:.2f}x", "right"),
        words("KV cache", lambda name: f"{100 * held[name]:.0f} %", "right"),
    ]
    return markdown(fill(columns, (BASELINE, *SHOWN)))


if __name__ == "__main__":
    fill_block(Path("README.md"), "numbers", numbers())
    fill_block(Path("README.md"), "front", table())
