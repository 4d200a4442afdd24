# SPDX-License-Identifier: Apache-2.0
"""``vtc bench``: accuracy, tokens, FLOPs and time of methods on tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .common import Mistake, ProgressBar, command, device_of, err, load, out, valid

DEFAULT_TASKS = ("easy-vqa", "scenes", "small-text")
EMBEDDED = {"small-text": "load_llava_next"}
"""The loader of the embedded model for a task; that of the tiny LLaVA for all others."""
DEFAULT_METHODS = ("fastv", "visionzip", "divprune", "pitome", "random", "downsample")
DEFAULT_KEEP = "1,0.5,0.33,0.22,0.11"
DEFAULT_SAMPLES = 80
FULL_SAMPLES = 500


@command
def bench(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(help="Tasks, such as easy-vqa or scenes.", show_default=False),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names, separated by commas.", show_default=False)
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Kept shares (0.33, 1/3) or token counts, separated by commas.")
    ] = DEFAULT_KEEP,
    flops: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            help="Instead of --keep: tune every method to this share of the LLM's FLOPs.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Questions of each task.", show_default=False)
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="All methods on 500 questions of each task."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a LLaVA; default: the embedded one."),
    ] = None,
    device: Annotated[str, typer.Option(help='"cpu", "cuda" or "auto".')] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 20,
    repeats: Annotated[
        int | None, typer.Option(min=0, help="Timed rounds.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of questions, bootstrap and random methods.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Only JSON on the standard output.")
    ] = False,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for results.")] = Path("results"),
    readme: Annotated[
        bool, typer.Option("--readme", help="Write the result tables into README.md.")
    ] = False,
) -> None:
    """Accuracy, tokens, FLOPs, milliseconds and KV bytes of each method at each budget.

    Example: vtc bench scenes --methods fastv,random --keep 0.33,0.11
    """
    from ..benchmarks import runner, tables
    from ..benchmarks.budgets import parse_keep, seeded
    from ..benchmarks.environment import write_json
    from ..benchmarks.tasks.base import TASKS, Task, score
    from ..method import known_methods

    chosen = tuple(tasks or DEFAULT_TASKS)
    for name in chosen:
        if name not in TASKS:
            raise Mistake(f'unknown task "{name}"; tasks are {", ".join(TASKS)}')
    if methods is None:
        names = tuple(known_methods()) if full else DEFAULT_METHODS
    else:
        names = tuple(n.strip() for n in methods.split(",") if n.strip())
    budgets = valid(lambda: tuple(parse_keep(k) for k in keep.split(",") if k.strip()))
    for name in names:
        valid(lambda name=name: seeded(name, None, seed))  # type: ignore[misc]
    settings = runner.Settings(
        methods=names,
        keep=budgets,
        flops=flops,
        batch_size=batch_size,
        repeats=repeats if repeats is not None else (9 if full else 5),
        seed=seed,
    )
    count = samples or (FULL_SAMPLES if full else DEFAULT_SAMPLES)

    loaded: dict[str, tuple[Any, Any]] = {}
    results = []
    for name in chosen:
        which = model or EMBEDDED.get(name, "load_llava")
        if which not in loaded:
            loaded[which] = load(model, which, device_of(device), dtype)
        net, processor = loaded[which]
        items = list(Task(name, n=count, seed=seed))
        with ProgressBar(name, quiet=as_json) as progress:
            result = runner.run(net, processor, name, items, score, settings, progress)
        results.append(result)
        write_json(result, out_dir / f"{name}.json")
        if not as_json:
            _print_table(result)
            written = [out_dir / f"{name}.json"]
            written += _pictures(net, processor, result, items, settings, out_dir)
            out.print(f"[dim]written: {', '.join(map(str, written))}[/dim]\n", soft_wrap=True)
        else:
            _pictures(net, processor, result, items, settings, out_dir)
    if readme:
        from ..benchmarks.catalogue import fill_block

        block = "results" if flops is None else "equal-flops"
        valid(lambda: fill_block(Path("README.md"), block, tables.overview(results)))
    if as_json:
        print(json.dumps(results, indent=1))


def _print_table(result: dict[str, Any]) -> None:
    from ..benchmarks.tables import COLUMNS, caption, cells, failures

    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1))
    for i, (name, _) in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    previous = None
    for row in result["rows"]:
        if previous not in (None, row["method"]):
            table.add_section()
        table.add_row(*cells(row), style="bold" if previous is None else None)
        previous = row["method"]
    wide = out if out.is_terminal else Console(width=150)
    wide.print(table)
    for text in failures([result]):
        wide.print(text, style="yellow", highlight=False)
    wide.print(caption(result), style="dim", highlight=False)


def _pictures(
    net: Any, processor: Any, result: dict[str, Any], items: Any, settings: Any, folder: Path
) -> list[Path]:
    """The Pareto plot and the kept-patch picture; without matplotlib only the latter."""
    from ..benchmarks.plots import pareto
    from ..benchmarks.show import show_kept

    written = []
    try:
        written.append(pareto(result, folder / f"{result['task']}-pareto.png"))
    except ModuleNotFoundError:
        err.print('no plot without matplotlib; pip install "visual-token-compression[bench]"')
    # A question whose answer has to be found in the picture.
    dull = ("yes", "no", "0", "none")
    example = next((item for item in items if item.answer not in dull), items[0])
    written.append(
        show_kept(
            net,
            processor,
            example,
            result["visual_tokens"],
            settings,
            folder / f"{result['task']}-kept.png",
        )
    )
    return written
