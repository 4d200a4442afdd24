# SPDX-License-Identifier: Apache-2.0
"""``vtc speed`` and ``vtc kernels``: what is timed with random weights and tensors."""

from __future__ import annotations

import csv
import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    AsJson,
    Device,
    Mistake,
    OutDir,
    ProgressBar,
    SomeMethods,
    command,
    console,
    device_of,
    err,
    load,
    out,
    print_written,
    valid,
)


@command
def speed(
    full: Annotated[bool, typer.Option("--full", help="Every method instead of a few.")] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="A grid of batches and prompts: where does it pay?")
    ] = False,
    methods: SomeMethods = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Kept share (0.22, 2/9) or token count.", show_default="0.22"),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Of vit-large, half-billion, seven-billion.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Your own model instead: folder or hub id.", show_default=False),
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=1, help="With --model: edge in pixels of the random images.")
    ] = 336,
    batch: Annotated[
        str | None, typer.Option(help="Prompts at once, such as 1,4,8.", show_default=False)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text tokens, such as 16,64,512.", show_default="64"),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Images of a prompt, such as 1,2.", show_default="1")
    ] = None,
    decode: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens after the first.",
            show_default="16, on a GPU 64 without --full and --sweep",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights.", show_default="float32, on a GPU bfloat16"),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Timed rounds.", show_default="5, 3 with --full or --sweep"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, methods and the order of runs.")] = 0,
    as_json: AsJson = False,
    out_dir: OutDir = Path("results"),
) -> None:
    """Time to the first token, decoding, memory: what is gained, and where nothing is.

    With random weights, on a ViT-L/14 and a 0.5 B decoder; on a GPU also on a 7 B LLaVA.

    Example: vtc speed --sweep --methods fastv,visionzip --batch 1,4 --text 16,512
    """
    import torch

    from ..benchmarks.shared.budgets import parse_keep
    from ..benchmarks.shared.files import write_json
    from ..benchmarks.speed import run as harness
    from ..benchmarks.speed.shapes import dtype_on, own

    where = device_of(device)
    kind = dtype or str(dtype_on(where)).removeprefix("torch.")
    if kind not in ("float32", "bfloat16", "float16"):
        raise Mistake(f'unknown dtype "{kind}"; use float32, bfloat16 or float16')
    if model is not None and shapes is not None:
        raise Mistake("give --model or --shapes, not both")
    settings = valid(
        lambda: harness.SpeedSettings(
            device=where,
            dtype=getattr(torch, kind),
            shapes=_names(shapes),
            methods=_names(methods),
            keep=None if keep is None else parse_keep(keep),
            batches=_counts(batch, "--batch"),
            texts=_counts(text, "--text"),
            images=_counts(images, "--images"),
            decode=decode,
            full=full,
            sweep=sweep,
            repeats=repeats,
            seed=seed,
        )
    )
    mine = None
    if model is not None:
        mine = own(*load(model, "load_llava", where, kind), Path(model).name, image_size)
    path = out_dir / f"speed{'-all' if full else ''}{'-sweep' if sweep else ''}.json"
    unwritten: list[str] = []

    def save(result: dict[str, Any]) -> None:
        """A full disk does not end the measurements."""
        try:
            write_json(result, path)
            unwritten.clear()
        except OSError as error:
            unwritten[:] = [f"cannot write {path}: {error.strerror}"]

    line = shlex.join(["vtc", *sys.argv[1:]])
    with ProgressBar("speed", quiet=as_json) as progress:
        result = harness.run(settings, mine, progress, save, line)
    save(result)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        _print_tables(result, sweep)
        if not unwritten:
            print_written([path])
    if unwritten:
        raise Mistake(unwritten[0])
    if not result["finished"]:
        err.print("interrupted: what was measured until then is in the result", style="yellow")
        raise typer.Exit(130)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(n.strip() for n in text.split(",") if n.strip())


def _counts(text: str | None, option: str) -> tuple[int, ...] | None:
    """Positive numbers, separated by commas."""
    if text is None:
        return None
    if not all(n.strip().isdecimal() and int(n) > 0 for n in text.split(",")):
        raise Mistake(f'{option} takes numbers above 0, such as 1,4; got "{text}"')
    return tuple(int(n) for n in text.split(","))


def _print_tables(result: dict[str, Any], sweep: bool) -> None:
    from ..benchmarks.shared.columns import terminal
    from ..benchmarks.speed.tables import grid, notes, table, verdicts

    wide = console(150)

    def show(made: Any) -> None:
        wide.print(made.title, style="italic", highlight=False)
        wide.print(terminal(made, whole=1, padding=(0, 1, 0, 0), pad_edge=True))

    for part in result["parts"]:
        show(table(part))
        for text in notes(part):
            wide.print(text, style="dim", highlight=False)
        wide.print()
    if sweep:
        show(grid(result))
        wide.print(f"Without a cross, {result['rule']}.", style="dim", highlight=False)
        for text in verdicts(result):
            wide.print(text, highlight=False)


@command
def kernels(
    device: Device = "auto",
    as_json: AsJson = False,
    out_dir: OutDir = Path("results"),
) -> None:
    """Check the fused kernels and time them beside eager torch and torch.compile.

    Example: vtc kernels --device cuda
    """
    from ..benchmarks.speed.kernels import bench_kernels

    quiet = (lambda text: None) if as_json else functools.partial(out.print, highlight=False)
    try:
        written = bench_kernels(device_of(device), out_dir, say=quiet)
    except RuntimeError as error:  # a kernel is wrong here, or triton is missing
        raise Mistake(str(error)) from None
    if as_json:
        tables = {path.stem: list(csv.DictReader(path.open())) for path in written}
        print(json.dumps(tables, indent=1))
    else:
        print_written(written)
