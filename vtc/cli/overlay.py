# SPDX-License-Identifier: Apache-2.0
"""``vtc overlay``: pictures of what a method kept, merged and preferred of an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    AsJson,
    Device,
    Dtype,
    Mistake,
    command,
    device_of,
    load,
    out,
    print_written,
    read_image,
    valid,
)

EMBEDDED = {None: "load_llava", "tiny-llava-next": "load_llava_next"}
"""Loaders of the embedded models by the value of --model."""
SHEET = 4
"""Pictures side by side with --all-layers."""


@command
def overlay(
    image: Annotated[Path, typer.Argument(help="A picture in any format that Pillow reads.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")] = "what is this?",
    method: Annotated[str, typer.Option(help="Name of the method.")] = "visionzip",
    keep: Annotated[str, typer.Option(help="Kept share (0.22, 1/3) or number of tokens.")] = "0.22",
    kind: Annotated[
        str, typer.Option(help="kept, groups or scores; several, separated by commas.")
    ] = "kept",
    layer: Annotated[
        str | None,
        typer.Option(
            help='What an LLM layer ran on (2), or a step ("encoder block 3"); default: the end.',
            show_default=False,
        ),
    ] = None,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Every step, side by side in one picture.")
    ] = False,
    view: Annotated[
        str, typer.Option(help="Of an image in crops: all, crops or thumbnail.")
    ] = "all",
    size: Annotated[
        int | None,
        typer.Option(min=16, max=8192, help="Longer side in pixels.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help='Folder or hub id, or "tiny-llava-next"; default: the embedded tiny LLaVA.'
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    seed: Annotated[int, typer.Option(help="Of random methods.")] = 0,
    as_json: AsJson = False,
    file: Annotated[
        Path, typer.Option("--out", help="PNG to write; of several kinds NAME-KIND.png.")
    ] = Path("overlay.png"),
) -> None:
    """Run a model on an image with a method and draw what became of its patches.

    Example: vtc overlay photo.jpg --question "what is on the table?" --method visionzip --keep 0.22
    """
    kinds = [k.strip() for k in kind.split(",") if k.strip()]
    if not kinds or file.suffix.lower() != ".png":
        raise Mistake('give at least one --kind, and an --out that ends in ".png"')
    if all_layers and layer is not None:
        raise Mistake("give --layer or --all-layers, not both")
    picture = read_image(image)

    from ..benchmarks.accuracy.kept_sheet import answered, sheet_of_stages, steps_of
    from ..benchmarks.shared.budgets import parse_keep, seeded
    from ..report.overlay import check_choice
    from ..report.overlay import overlay as draw

    for k in kinds:
        valid(lambda k=k: check_choice(k, view))  # type: ignore[misc]
    chosen = valid(lambda: seeded(method, parse_keep(keep), seed))
    net, processor = load(
        None if model in EMBEDDED else model,
        EMBEDDED.get(model, ""),
        device_of(device),
        dtype,
    )
    answer, report = valid(
        lambda: answered(net, processor, picture, question, chosen, max_new_tokens)
    )
    at = int(layer) if layer is not None and layer.lstrip("-").isdigit() else layer
    how: dict[str, Any] = {"processor": processor, "size": size, "view": view}
    pictures = {}
    for k in kinds:
        path = file if len(kinds) == 1 else file.with_name(f"{file.stem}-{k}.png")
        pictures[path] = valid(
            lambda k=k: (
                sheet_of_stages(report, picture, SHEET, kind=k, **how)  # type: ignore[misc]
                if all_layers
                else draw(report, picture, kind=k, layer=at, **how)
            )
        )
    for path, drawn in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path)
    result = {
        "question": question,
        "answer": answer,
        "method": report.method,
        "visual_tokens": report.visual_tokens,
        "final_tokens": report.final_tokens,
        "kv_tokens": report.kv_tokens,
        "stages": steps_of(report),
        "files": [str(path) for path in pictures],
    }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    out.print(f"answer: {answer}", highlight=False, soft_wrap=True)
    tokens = f"visual tokens: {report.visual_tokens:g} -> {report.final_tokens:g} in the last layer"
    tokens += f", {report.kv_tokens:g} in the KV cache on average; {report.method}"
    out.print(tokens, highlight=False, soft_wrap=True)
    for label, count in steps_of(report):
        out.print(f"  {label}: {count}", highlight=False)
    print_written(pictures)
