# SPDX-License-Identifier: Apache-2.0
"""``vtc match`` and ``vtc calibrate``: budgets at which methods cost, or answer, the same."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench import EMBEDDED
from .common import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    LLaVA,
    Methods,
    Mistake,
    OutDir,
    ProgressBar,
    command,
    console,
    device_of,
    err,
    load,
    out,
    print_written,
    read_image,
    valid,
)

METHODS = "fastv,visionzip,divprune,pitome,random"


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise Mistake("give at least one method, such as fastv,visionzip; see vtc methods")
    return names


@command
def match(
    methods: Annotated[str, typer.Argument(help="Names, separated by commas.")],
    flops: Annotated[float, typer.Option(help="Wanted share of the FLOPs, in (0, 1].")],
    which: Annotated[
        str, typer.Option(help='"llm": visual tokens in the LLM; "all": every token and module.')
    ] = "llm",
    tolerance: Annotated[float, typer.Option(help="Largest distance from the share.")] = 0.01,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id; default: the embedded LLaVA.", show_default=False),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture of the prompt; default: one of scenes.", show_default=False),
    ] = None,
    question: Annotated[str, typer.Option(help="Text of the prompt.")] = "What is shown here?",
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Tune methods to the same FLOPs on one prompt; a method out of reach says what it reaches.

    Example: vtc match fastv,visionzip --flops 0.4
    """
    from ..benchmarks.shared.budgets import seeded
    from ..benchmarks.shared.prompts import prompt_of
    from ..benchmarks.tasks.scenes import make_scene, render

    chosen = [valid(lambda name=name: seeded(name, None, 0)) for name in _names(methods)]  # type: ignore[misc]
    picture = render(make_scene(0, "test", 0)) if image is None else read_image(image)
    net, processor = load(model, "load_llava", device_of(device), dtype)
    inputs = processor(text=[prompt_of(processor, question)], images=[picture], return_tensors="pt")
    inputs = dict(inputs.to(net.device, net.dtype))
    rows = [_matched(net, inputs, method, flops, which, tolerance) for method in chosen]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _print_matched(rows)
    if all(row["error"] is not None for row in rows):
        raise typer.Exit(2)


def _matched(
    net: Any, inputs: Any, method: Any, flops: float, which: str, tolerance: float
) -> dict[str, Any]:
    """One method at the wanted share; its row has an error where it cannot reach it."""
    from .. import compressing
    from .. import match as tune
    from ..errors import UnsupportedError
    from ..tuning.match import flops_share, prefill

    try:
        how: dict[str, Any] = {"model": net, "inputs": inputs, "which": which}
        tuned = tune(method, flops, tolerance=tolerance, **how)
        found: Any = tuned[method.name]
    except UnsupportedError as error:
        return {"method": method.name, "error": str(error)}
    except ValueError as error:
        raise Mistake(str(error)) from None
    with compressing(net, found) as session:
        prefill(net, inputs)
        report = session.report()
    given = {f.name: getattr(found, f.name) for f in fields(found)}
    changed = [f"{f.name}={given[f.name]!r}" for f in fields(found) if given[f.name] != f.default]
    return {
        "method": str(found),
        "keep_ratio": found.keep_ratio,
        "visual_tokens": report.visual_tokens,
        "final_tokens": report.final_tokens,
        "average_tokens": report.average_tokens,
        "flops_share": flops_share(report, "llm"),
        "flops_all_share": flops_share(report, "all"),
        "python": f'vtc.wrap(model, "{found.name}", {", ".join(changed)})',
        "error": None,
    }


def _print_matched(rows: list[dict[str, Any]]) -> None:
    from ..benchmarks.shared.columns import fill, number, terminal, words

    columns = (
        words("method", lambda row: row["method"].split("(")[0]),
        number("keep_ratio", "keep_ratio", 4),
        words(
            "tokens",
            lambda row: f"{row['final_tokens']:g} of {row['visual_tokens']:g}",
            "right",
        ),
        number("LLM FLOPs %", "flops_share", 1, 100),
        number("all FLOPs %", "flops_all_share", 1, 100),
    )
    found = [row for row in rows if row["error"] is None]
    if found:
        out.print(terminal(fill(columns, found)))
    for row in found:
        out.print(row["python"], highlight=False, soft_wrap=True)
    for row in rows:
        if row["error"] is not None:
            err.print(f"left out: {row['error']}", highlight=False, soft_wrap=True)


@command
def calibrate(
    task: Annotated[
        str, typer.Argument(help="A task such as scenes, or a file or folder of your own.")
    ] = "scenes",
    methods: Methods = METHODS,
    max_divergence: Annotated[
        float, typer.Option(help="Mean KL divergence from the stock model, in nats.")
    ] = 0.2,
    samples: Annotated[int, typer.Option(min=1, help="Images that calibrate, unlabeled.")] = 64,
    held_out: Annotated[
        int, typer.Option(min=0, help="Questions about other images, to see what is lost.")
    ] = 300,
    steps: Annotated[int, typer.Option(min=0, help="Bisections behind the grid.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 6,
    model: LLaVA = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 16,
    seed: Annotated[int, typer.Option(help="Of questions, bounds and random methods.")] = 0,
    as_json: AsJson = False,
    out_dir: OutDir = Path("results"),
) -> None:
    """The strongest compression within a divergence of the stock model, and what it really loses.

    Calibration sees questions without answers; held-out questions about other images then say what
    was lost, beside what was promised.

    Example: vtc calibrate scenes --methods fastv,random --samples 64 --held-out 300
    """
    from ..benchmarks.accuracy import calibration
    from ..benchmarks.pages.plots import calibration_plot
    from ..benchmarks.shared.budgets import seeded
    from ..benchmarks.shared.files import write_json
    from ..benchmarks.tasks.registry import open_task

    settings = calibration.CalibrationSettings(
        methods=_names(methods),
        samples=samples,
        held_out=held_out,
        max_divergence=max_divergence,
        max_new_tokens=max_new_tokens,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    for name in settings.methods:
        valid(lambda name=name: seeded(name, None, seed))  # type: ignore[misc]
    count = 5 * samples + held_out  # most tasks ask several questions about an image
    opened = valid(lambda: open_task(task, n=count, seed=seed))
    net, processor = load(model, EMBEDDED.get(task, "load_llava"), device_of(device), dtype)
    path = out_dir / f"calibration-{Path(opened.name).stem}.json"
    with ProgressBar(f"calibrate {opened.name}", quiet=as_json) as progress:
        result = valid(
            lambda: calibration.run(
                net,
                processor,
                opened,
                settings,
                command=shlex.join(["vtc", *sys.argv[1:]]),
                progress=progress,
                save=lambda found: write_json(found, path),
            )
        )
    written = [path]
    try:
        if any(row["error"] is None for row in result["rows"]):
            written.append(calibration_plot(result, path.with_suffix(".png")))
    except ModuleNotFoundError:
        err.print('no plot without matplotlib; pip install "visual-token-compression[bench]"')
    if as_json:
        print(json.dumps(result, indent=1))
        return
    _print_chosen(result)
    print_written(written)


def _print_chosen(result: dict[str, Any]) -> None:
    from ..benchmarks.shared.columns import between, fill, number, terminal, words

    columns = (
        words("method", "method"),
        number("keep_ratio", "keep_ratio", 4),
        number("tokens", "final_tokens"),
        words("KL, at most", lambda row: f"{row['kl']:.3f}, {row['kl_high']:.3f}", "right"),
        number("same %", "agreement", 1, 100),
        between("lost, points", "loss", ends="[{:.1f}, {:.1f}]"),
        number("promised, points", "promised_loss", 1, 100),
    )
    rows = []
    for row in result["rows"]:
        if row["error"] is not None:
            err.print(f"{row['method']}: {row['error']}", highlight=False)
            continue
        at = row["chosen"]
        held = [x for x in row["held_out"] if x["keep_ratio"] == at["keep_ratio"]]
        rows.append({**(held[0] if held else {}), **at, "method": row["method"]})
    console(120).print(terminal(fill(columns, rows)))
