# SPDX-License-Identifier: Apache-2.0
"""The command ``vtc``: bench, inspect, methods, version."""

from __future__ import annotations

import csv
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from . import __version__

app = typer.Typer(
    help="Visual token compression for multimodal LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

DEFAULT_TASKS = ("easy-vqa", "scenes", "small-text")
EMBEDDED = {"small-text": "load_llava_next"}
"""The loader of the embedded model for a task; that of the tiny LLaVA for all others."""
DEFAULT_METHODS = ("fastv", "visionzip", "divprune", "pitome", "random", "downsample")
DEFAULT_KEEP = "1,0.5,0.33,0.22,0.11"
DEFAULT_SAMPLES = 80
FULL_SAMPLES = 500


class Mistake(Exception):
    """Something the caller got wrong; printed as one line."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose expected errors end in one clear line and exit code 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from .errors import UnsupportedError

        try:
            function(*args, **kwargs)
        except (Mistake, UnsupportedError) as error:
            err.print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
            raise typer.Exit(2) from None
        except ImportError as error:
            missing = error.name or str(error)
            if not any(name in missing for name in ("easy", "matplotlib", "torchvision")):
                raise
            text = f'error: {missing}; pip install "visual-token-compression[bench]"'
            err.print(text, style="red", highlight=False, soft_wrap=True, markup=False)
            raise typer.Exit(2) from None

    return app.command()(run)


@command
def version() -> None:
    """Versions of vtc, torch and transformers."""
    import torch
    import transformers

    out.print(
        f"vtc {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


@command
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """All methods: where they act, what they need, what they do."""
    from .benchmarks.catalogue import method_rows

    rows = method_rows()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("method", "acts", "needs", "default keep", "what it does"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row["name"], row["acts"], row["needs"], row["default"], row["summary"])
    out.print(table)


@command
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, folder or config.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """How vtc sees a model and which methods work on it, from its configuration alone."""
    import transformers

    from .inspecting import inspect as look

    transformers.logging.set_verbosity_error()
    try:
        found = look(model)
    except (OSError, ValueError) as error:
        from .errors import UnsupportedError

        if isinstance(error, UnsupportedError):
            raise
        first = str(error).strip().splitlines()[0]
        raise Mistake(f"cannot read {model}: {first}") from None
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        out.print(str(found), highlight=False, markup=False, soft_wrap=True)


@command
def bench(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            help='Tasks, such as easy-vqa or scenes; or "speed", or "kernels".', show_default=False
        ),
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
        typer.Option("--full", help="All methods on 500 questions of each task; of speed, all."),
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

    "vtc bench speed" measures how much of the promised speed-up is reached, with random weights, on
    a ViT-L/14 and a 0.5 B decoder, on a GPU also on a 7 B LLaVA. "vtc bench kernels" checks the
    fused kernels and times them beside eager torch and torch.compile.
    """
    if tasks == ["speed"]:
        _speed(device, repeats, seed, full, as_json, out_dir)
        return
    if tasks == ["kernels"]:
        _kernels(device, as_json, out_dir)
        return

    from .benchmarks import runner, tables
    from .benchmarks.tasks.base import TASKS, Task, score
    from .method import known_methods

    chosen = tuple(tasks or DEFAULT_TASKS)
    for name in chosen:
        if name not in TASKS:
            raise Mistake(
                f'unknown task "{name}"; tasks are {", ".join(TASKS)}, and speed and kernels'
            )
    if methods is None:
        names = tuple(known_methods()) if full else DEFAULT_METHODS
    else:
        names = tuple(n.strip() for n in methods.split(",") if n.strip())
    budgets = _valid(lambda: tuple(runner.parse_keep(k) for k in keep.split(",") if k.strip()))
    for name in names:
        _valid(lambda name=name: runner.seeded(name, None, seed))  # type: ignore[misc]
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
            loaded[which] = _load(model, which, _device(device), dtype)
        net, processor = loaded[which]
        items = list(Task(name, n=count, seed=seed))
        with _progress(name, quiet=as_json) as progress:
            result = runner.run(net, processor, name, items, score, settings, progress)
        results.append(result)
        runner.write_json(result, out_dir / f"{name}.json")
        if not as_json:
            _print_table(result)
            written = [out_dir / f"{name}.json"]
            written += _pictures(net, processor, result, items, settings, out_dir)
            out.print(f"[dim]written: {', '.join(map(str, written))}[/dim]\n", soft_wrap=True)
        else:
            _pictures(net, processor, result, items, settings, out_dir)
    if readme:
        from .benchmarks.catalogue import fill_block

        block = "results" if flops is None else "equal-flops"
        _valid(lambda: fill_block(Path("README.md"), block, tables.overview(results)))
    if as_json:
        print(json.dumps(results, indent=1))


def _valid(function: Callable[[], Any]) -> Any:
    """Run a check of the arguments; what it refuses is the caller's mistake."""
    try:
        return function()
    except (ValueError, FileNotFoundError) as error:
        raise Mistake(str(error)) from None


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:
        raise Mistake(f'unknown device "{name}"; use cpu, cuda or auto') from None
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise Mistake("no CUDA device is available; use --device cpu")
    return name


def _load(model: str | None, embedded: str, device: str, dtype: str) -> tuple[Any, Any]:
    """An embedded model by the name of its loader, or any other by folder or hub id."""
    import torch
    import transformers

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise Mistake(f'unknown dtype "{dtype}"; use {", ".join(kinds)}')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if model is None:
            from .benchmarks.tiny import models

            net, processor = getattr(models, embedded)(device)
        else:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            processor = AutoProcessor.from_pretrained(model)
            net = AutoModelForImageTextToText.from_pretrained(model)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise Mistake(f"cannot load {model or 'the embedded model'}: {first}") from None
    return net.to(device, kinds[dtype]).eval(), processor


class _progress:
    """A bar on the standard error, or nothing."""

    def __init__(self, title: str, quiet: bool) -> None:
        self.title, self.quiet = title, quiet
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
            disable=quiet or not err.is_terminal,
            transient=True,
        )
        self.task: Any = None

    def __enter__(self) -> Callable[[str, int, int], None]:
        if not self.quiet and not err.is_terminal:
            err.print(f"{self.title} ...")
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=None)

        def progress(text: str, done: int, total: int) -> None:
            self.bar.update(
                self.task, description=f"{self.title}: {text}", completed=done, total=total
            )

        return progress

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def _kernels(device: str, as_json: bool, out_dir: Path) -> None:
    """The CSV files of the kernel benchmark, in rows with --json."""
    from .benchmarks.kernels import bench_kernels

    quiet = (lambda text: None) if as_json else functools.partial(out.print, highlight=False)
    try:
        written = bench_kernels(_device(device), out_dir, say=quiet)
    except RuntimeError as error:  # a kernel is wrong here, or triton is missing
        raise Mistake(str(error)) from None
    if as_json:
        tables = {path.stem: list(csv.DictReader(path.open())) for path in written}
        print(json.dumps(tables, indent=1))
    else:
        out.print(f"[dim]written: {', '.join(map(str, written))}[/dim]", soft_wrap=True)


def _print_table(result: dict[str, Any]) -> None:
    from .benchmarks.tables import COLUMNS, caption, cells, failures

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
    from .benchmarks.plots import pareto
    from .benchmarks.show import show_kept

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


def _speed(
    device: str, repeats: int | None, seed: int, full: bool, as_json: bool, folder: Path
) -> None:
    from .benchmarks import speed
    from .benchmarks.runner import write_json

    with _progress("speed", quiet=as_json) as progress:
        result = speed.run(_device(device), repeats or 7, seed, progress, full)
    path = folder / ("speed-all.json" if full else "speed.json")
    write_json(result, path)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for part in result["parts"]:
        table = Table(title=part["title"], title_justify="left", header_style="bold", box=None)
        for i, name in enumerate(speed.COLUMNS):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in part["rows"]:
            table.add_row(*speed.cells(row))
        (out if out.is_terminal else Console(width=150)).print(table)
    out.print(f"[dim]written: {path}[/dim]", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(app())
