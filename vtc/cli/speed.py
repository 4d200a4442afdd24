# SPDX-License-Identifier: Apache-2.0
"""``vtc speed`` and ``vtc kernels``: what is timed with random weights and tensors."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .common import Mistake, ProgressBar, command, device_of, out


@command
def speed(
    full: Annotated[
        bool, typer.Option("--full", help="Every method at 22 % instead of a few.")
    ] = False,
    device: Annotated[str, typer.Option(help='"cpu", "cuda" or "auto".')] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 7,
    seed: Annotated[int, typer.Option(help="Of random weights and methods.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Only JSON on the standard output.")
    ] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results.")] = Path("results"),
) -> None:
    """How much of the speed-up that FLOPs promise is really there, with random weights.

    On a ViT-L/14 and a 0.5 B decoder; on a GPU also on a 7 B LLaVA.

    Example: vtc speed --full --repeats 3
    """
    from ..benchmarks import speed as harness
    from ..benchmarks.environment import write_json

    with ProgressBar("speed", quiet=as_json) as progress:
        result = harness.run(device_of(device), repeats, seed, progress, full)
    path = out_dir / ("speed-all.json" if full else "speed.json")
    write_json(result, path)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for part in result["parts"]:
        table = Table(title=part["title"], title_justify="left", header_style="bold", box=None)
        for i, name in enumerate(harness.COLUMNS):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in part["rows"]:
            table.add_row(*harness.cells(row))
        (out if out.is_terminal else Console(width=150)).print(table)
    out.print(f"[dim]written: {path}[/dim]", soft_wrap=True)


@command
def kernels(
    device: Annotated[str, typer.Option(help='"cpu", "cuda" or "auto".')] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Only JSON on the standard output.")
    ] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results.")] = Path("results"),
) -> None:
    """Check the fused kernels and time them beside eager torch and torch.compile.

    Example: vtc kernels --device cuda
    """
    from ..benchmarks.kernels import bench_kernels

    quiet = (lambda text: None) if as_json else functools.partial(out.print, highlight=False)
    try:
        written = bench_kernels(device_of(device), out_dir, say=quiet)
    except RuntimeError as error:  # a kernel is wrong here, or triton is missing
        raise Mistake(str(error)) from None
    if as_json:
        tables = {path.stem: list(csv.DictReader(path.open())) for path in written}
        print(json.dumps(tables, indent=1))
    else:
        out.print(f"[dim]written: {', '.join(map(str, written))}[/dim]", soft_wrap=True)
