# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a prefill with each method, from a thousand visual tokens to 32 thousand.

``python -m vtc.benchmarks.speed.memory_growth`` runs every method on one image of N tokens (methods
for videos on frames of 64) through a mini model of one head of width 32, so that what grows with N
squared stands out, and writes a CSV file. ``--show FILE`` prints the table of such a file.

* peak_bytes: tensors held at once, at most, beyond weights and inputs, summed up from every
  allocation that torch's profiler sees. "stock" is the same prompt without vtc.
* exponent: of N in the peak, between the last two N measured: 1 is linear, 2 quadratic.
* A run that needs more than ``--limit`` GiB is stopped by the operating system and left empty.
"""

from __future__ import annotations

import argparse
import csv
import resource
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import isqrt, log
from pathlib import Path
from typing import Any

import torch

from ...method import Method
from ...registry import known_methods
from ...session import compressing
from ..measure.allocations import Allocations, watched
from ..shared.budgets import seeded
from ..shared.columns import comma_separated, fill, markdown, measured, plain, words
from ..shared.files import write_whole
from ..support import mini_families
from ..support.mini_models import mini_llava

STOCK, STOCK_VIDEO = "stock", "stock, video"
TOKENS = (1024, 4096, 16384, 32400)
"""The last is 180 x 180, the largest square below 32k."""
SHARE = 2, 9
"""Of the tokens stay: the 128 of 576 of the literature."""
OTHER_SHARES = {"tops": (1, 500), "vispruner": (9, 10)}
"""Of methods whose loops would take hours; they need most before they begin."""
FRAME = 64
"""LLM tokens of a frame of the videos."""
COLUMNS = ("method", "tokens", "peak_bytes")

GrowthRow = dict[str, Any]


def chosen(name: str, tokens: int) -> Method:
    """The method with the budget, or as it comes if it takes none."""
    if name == "mod":  # its routers come with a trained model
        g = torch.Generator().manual_seed(0)
        routers = {i: torch.randn(32, generator=g) for i in (1, 3)}
        return known_methods()[name](routers=routers)  # type: ignore[call-arg]
    part, whole = OTHER_SHARES.get(name, SHARE)
    try:
        return seeded(name, max(1, tokens * part // whole), 0)
    except ValueError:
        return seeded(name, None, 0)


def image_prompt(tokens: int) -> tuple[Any, dict[str, Any]]:
    """A LLaVA with a CLIP tower and a prompt with one image of so many tokens.

    Raises:
        ValueError: the image would not be square.
    """
    side = isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"one square image cannot have {tokens} tokens; give a square number")
    model = mini_llava(image_size=14 * side, heads=1)
    ids = torch.tensor([[1, *[3] * tokens, 8, 9, 10]])
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 14 * side, 14 * side, generator=g)
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }


def video_prompt(tokens: int) -> tuple[Any, dict[str, Any]]:
    """A Qwen2-VL and a prompt with one video of so many tokens."""
    family, frames, side = "Qwen2-VL", max(1, tokens // FRAME), isqrt(FRAME)
    return mini_families.build(family), mini_families.video(family, frames, side)


@torch.no_grad()
def peak(model: Any, inputs: dict[str, Any]) -> int | None:
    """Bytes of one prefill beyond weights and inputs; None where it needs more than there is."""
    found = Allocations()
    try:
        with watched(torch.device("cpu"), found):
            model(**inputs, use_cache=True, logits_to_keep=1)
    except (RuntimeError, MemoryError) as error:
        if "memory" in str(error) or isinstance(error, MemoryError):
            return None
        raise
    return found.peak


def measure(
    names: Iterable[str],
    tokens: Sequence[int],
    keep: Callable[[GrowthRow], None] = lambda row: None,
) -> list[GrowthRow]:
    """A row for each method and N, those of the stock models first.

    Args:
        keep: called with each row as it is there.
    """
    rows: list[GrowthRow] = []

    def note(name: str, n: int, bytes_: int | None) -> None:
        rows.append({"method": name, "tokens": n, "peak_bytes": bytes_})
        keep(rows[-1])

    known = known_methods()
    names = list(names)
    for n in tokens:
        for make, title, of in (
            (image_prompt, STOCK, [m for m in names if "frames" not in known[m].needs]),
            (video_prompt, STOCK_VIDEO, [m for m in names if "frames" in known[m].needs]),
        ):
            if not of:
                continue
            model, inputs = make(n)
            n_real = int(torch.isin(inputs["input_ids"], torch.tensor([3, 4])).sum())
            note(title, n_real, peak(model, inputs))
            for name in of:
                with compressing(model, chosen(name, n_real)):
                    note(name, n_real, peak(model, inputs))
    return rows


def exponent(points: Sequence[tuple[int, int]]) -> float | None:
    """Of N in bytes ~ N^a, between the last two of (N, bytes); None for fewer."""
    if len(points) < 2:
        return None
    (n, a), (m, b) = points[-2:]
    return log(b / a) / log(m / n)


def by_method(rows: Iterable[GrowthRow]) -> dict[str, dict[int, int | None]]:
    """Method -> N -> bytes, in the order of the rows, the stock models first."""
    out: dict[str, dict[int, int | None]] = {STOCK: {}}
    for row in rows:
        out.setdefault(row["method"], {})[row["tokens"]] = row["peak_bytes"]
    return out


def table(rows: Sequence[GrowthRow]) -> str:
    """Markdown: MiB by method and N, the exponent, and the last N in stock models."""
    methods = by_method(rows)
    videos = {row["tokens"] for row in rows if row["method"] == STOCK_VIDEO}
    columns = sorted({row["tokens"] for row in rows if row["method"] == STOCK} or videos)

    def peak(n: int, name: str) -> str:
        near = min(methods[name], key=lambda m: abs(m - n))  # videos come in whole frames
        if abs(near - n) > FRAME:
            return ""  # not measured
        value = methods[name][near]
        return "more" if value is None else f"{value / 2**20:,.1f}"

    def power(name: str) -> float | None:
        peaks = sorted(methods[name].items())
        return exponent([(n, value) for n, value in peaks if value is not None])

    made = [
        words("method", str),
        *(words(f"N = {n:,}", partial(peak, n), "right") for n in columns),
        measured("exponent", power, "{:.2f}".format),
    ]
    return markdown(fill(made, [name for name, peaks in methods.items() if peaks]))


def read(path: Path) -> list[GrowthRow]:
    """Rows of a CSV file."""
    with path.open(newline="") as file:
        return [
            {
                "method": row["method"],
                "tokens": int(row["tokens"]),
                "peak_bytes": int(row["peak_bytes"]) if row["peak_bytes"] else None,
            }
            for row in csv.DictReader(file)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vtc.benchmarks.speed.memory_growth", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--methods", help="names, separated by commas; all when left out")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="square numbers")
    parser.add_argument("--limit", type=float, default=8, help="GiB that a run may take")
    parser.add_argument("--out", type=Path, default=Path("results/memory-cpu.csv"))
    parser.add_argument("--show", type=Path, help="print the table of this CSV file, run nothing")
    args = parser.parse_args()
    if args.show:
        print(table(read(args.show)))
        return
    resource.setrlimit(resource.RLIMIT_DATA, (int(args.limit * 2**30), resource.RLIM_INFINITY))
    names = args.methods.split(",") if args.methods else list(known_methods())
    columns, rows = [plain(name) for name in COLUMNS], list[GrowthRow]()

    def keep(row: GrowthRow) -> None:
        rows.append(row)
        write_whole(args.out, comma_separated(fill(columns, rows)))
        print(row, flush=True)

    measure(names, [int(n) for n in args.tokens.split(",")], keep)
    print(table(rows))


if __name__ == "__main__":
    main()
