# SPDX-License-Identifier: Apache-2.0
"""``vtc bench``: accuracy, tokens, FLOPs and time of methods on tasks."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Keep,
    LLaVA,
    Mistake,
    OutDir,
    ProgressBar,
    SomeMethods,
    command,
    device_of,
    err,
    load,
    out,
    print_rows,
    print_written,
    valid,
)

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
        typer.Argument(
            help="Tasks: names such as easy-vqa or scenes, files or folders of your own, or data "
            "sets of the hub.",
            show_default=False,
        ),
    ] = None,
    methods: SomeMethods = None,
    keep: Keep = DEFAULT_KEEP,
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
        int | None,
        typer.Option(
            min=1,
            help="Questions of each task; default: 80 of the package's own, all of other data.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="All methods on 500 questions of each task."),
    ] = False,
    metric: Annotated[
        str | None,
        typer.Option(help="What an answer is worth; default: the task's.", show_default=False),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="A local copy of a hub set, laid out as the hub has it; default: $VTC_DATA/NAME.",
            show_default=False,
        ),
    ] = None,
    model: LLaVA = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 6,
    repeats: Annotated[
        int | None, typer.Option(min=0, help="Timed rounds.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of questions, bootstrap and random methods.")] = 0,
    as_json: AsJson = False,
    out_dir: OutDir = Path("results"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; do not go on with an unfinished run.")
    ] = False,
    readme: Annotated[
        bool, typer.Option("--readme", help="Write the result tables into docs/results.md.")
    ] = False,
) -> None:
    """Accuracy, tokens, FLOPs, milliseconds and KV bytes of each method at each budget.

    A run that was stopped or killed goes on when the same command is given again. With "accelerate
    launch --num_processes 8 -m vtc.cli bench ..." several GPUs share the work.

    Example: vtc bench scenes --methods fastv,random --keep 0.33,0.11
    """
    from ..benchmarks.accuracy import distributed
    from ..benchmarks.accuracy import run as runner
    from ..benchmarks.accuracy.journal import JournalError, seal
    from ..benchmarks.metrics.scores import metric as find_metric
    from ..benchmarks.shared.budgets import parse_keep, seeded
    from ..benchmarks.tasks.items import BadItem
    from ..benchmarks.tasks.registry import TASKS, open_task
    from ..registry import known_methods

    if methods is None:
        names = tuple(known_methods()) if full else DEFAULT_METHODS
    else:
        names = tuple(n.strip() for n in methods.split(",") if n.strip())
    budgets = valid(lambda: tuple(parse_keep(k) for k in keep.split(",") if k.strip()))
    for name in names:
        valid(functools.partial(seeded, name, None, seed))
    settings = runner.BenchSettings(
        methods=names,
        keep=budgets,
        flops=flops,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        repeats=repeats if repeats is not None else (9 if full else 5),
        seed=seed,
    )
    usual = FULL_SAMPLES if full else DEFAULT_SAMPLES
    opened: dict[str, Any] = {}
    for spec in tasks or DEFAULT_TASKS:
        count = samples or (usual if spec in TASKS else None)
        chosen = functools.partial(open_task, spec, n=count, seed=seed)
        task = valid(functools.partial(chosen, metric=metric, data_dir=data_dir))
        if runner.file_stem(task.name) in opened:
            raise Mistake(f'two tasks are called "{task.name}"; run each with an --out of its own')
        opened[runner.file_stem(task.name)] = task

    loaded: dict[str, tuple[Any, Any]] = {}
    results: list[dict[str, Any]] = []
    complete, place = True, device_of(device)
    call = shlex.join(["vtc", *(word for word in sys.argv[1:] if word != "--fresh")])
    with distributed.joined(place) as world:
        for task in opened.values():
            which = model or EMBEDDED.get(task.name, "load_llava")
            if which not in loaded:
                loaded[which] = load(model, which, place, dtype)
            net, processor = loaded[which]
            try:
                with ProgressBar(task.name, quiet=not world.is_main) as progress:
                    result = runner.run(
                        *(net, processor, task.name, task, find_metric(task.metric)),
                        *(settings, progress),
                        out=out_dir,
                        fresh=fresh,
                        more=True,
                        command=call,
                        say=_say,
                        world=world,
                    )
            except (JournalError, BadItem, distributed.LostError) as error:
                raise Mistake(str(error)) from None
            if world.is_main and result["questions"]:
                results.append(result)
                complete &= _show(net, processor, result, task, settings, out_dir, as_json)
            if world.stopped:
                break
    if not world.is_main:
        raise typer.Exit(130 if world.stopped else 0)
    if complete and not world.stopped:
        for name in opened:
            seal(out_dir / f"{name}.predictions.jsonl")
    if readme and not world.stopped:
        from ..benchmarks.accuracy import tables
        from ..benchmarks.shared.markdown import fill_block

        block = "results" if flops is None else "equal-flops"
        valid(lambda: fill_block(Path("docs/results.md"), block, tables.overview(results)))
    if as_json:
        print(json.dumps(results, indent=1))
    if world.stopped:
        _say(f"stopped; to go on: {call}")
        raise typer.Exit(130)
    if not complete:
        raise typer.Exit(1)


def _say(text: str) -> None:
    err.print(text, style="yellow", highlight=False, soft_wrap=True)


def _show(
    net: Any,
    processor: Any,
    result: dict[str, Any],
    task: Any,
    settings: Any,
    folder: Path,
    as_json: bool,
) -> bool:
    """Print a result and draw its pictures; whether all its files could be written."""
    from ..benchmarks.accuracy.run import file_stem
    from ..benchmarks.accuracy.tables import COLUMNS, caption, failures, notes

    if not as_json:
        print_rows(result["rows"], COLUMNS)
        for text in failures([result]):
            out.print(text, style="yellow", highlight=False, soft_wrap=True)
        out.print(caption(result), style="dim", highlight=False, soft_wrap=True)
    for text in notes(result):
        _say(text)
    base = file_stem(result["task"])
    written = [folder / f"{base}.json", folder / f"{base}.predictions.jsonl"]
    lost = [entry["where"] for entry in result["unwritten"]]
    if result["finished"]:
        try:
            written += _pictures(net, processor, result, task, settings, folder / base)
        except OSError as error:
            lost.append(str(error.filename))
            _say(f"cannot write the pictures: {error.strerror or error}")
    if not as_json:
        there = [str(path) for path in written if str(path) not in lost]
        print_written(there)
        out.print()
    return not lost


def _pictures(
    net: Any, processor: Any, result: dict[str, Any], task: Any, settings: Any, base: Path
) -> list[Path]:
    """The Pareto plot and the kept-patch picture; without matplotlib only the latter."""
    from ..benchmarks.accuracy.kept_sheet import example, show_kept
    from ..benchmarks.pages.plots import pareto

    written = []
    try:
        written.append(pareto(result, base.with_name(base.name + "-pareto.png")))
    except ModuleNotFoundError:
        err.print('no plot without matplotlib; pip install "visual-token-compression[bench]"')
    path = base.with_name(base.name + "-kept.png")
    total = result["visual_tokens"]
    written.append(show_kept(net, processor, example(task), total, settings, path))
    return written
