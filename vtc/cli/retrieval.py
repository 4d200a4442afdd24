# SPDX-License-Identifier: Apache-2.0
"""``vtc retrieval`` and ``vtc classify``: image encoders with compression, without an LLM."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    AsJson,
    Device,
    Dtype,
    Keep,
    Methods,
    Mistake,
    OutDir,
    ProgressBar,
    command,
    device_of,
    out,
    print_rows,
    print_written,
    valid,
)

if TYPE_CHECKING:
    from ..benchmarks.shared.columns import Column

DEFAULT_METHODS = "pitome,tome,zero-tprune,random,downsample,pool"
DEFAULT_KEEP = "0.5,0.33,0.22"

Model = Annotated[
    str,
    typer.Option(
        help='"embedded", a hub id or folder of a Hugging Face CLIP or SigLIP, '
        "open_clip:ARCHITECTURE/WEIGHTS or open_clip:hf-hub:ID."
    ),
]
AnyModel = Annotated[str, typer.Option(help="As for retrieval, or timm:NAME, a classifier.")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Images; default: all.", show_default=False)
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images encoded together, and timed.")]
Repeats = Annotated[int, typer.Option(min=0, help="Timed rounds; 0 measures no time.")]
Seed = Annotated[int, typer.Option(help="Of samples, bootstrap and random methods.")]


@command
def retrieval(
    data: Annotated[
        str, typer.Argument(help="scenes, a .jsonl or .parquet file, or a hub data set.")
    ] = "scenes",
    model: Model = "embedded",
    methods: Methods = DEFAULT_METHODS,
    keep: Keep = DEFAULT_KEEP,
    samples: Samples = None,
    batch_size: BatchSize = 16,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
    out_dir: OutDir = Path("results"),
) -> None:
    """Recall@1, 5 and 10 of images and captions, both ways, for each method at each budget.

    A line of a .jsonl file is {"image": "a.jpg", "captions": ["...", "..."]}.

    Example: vtc retrieval scenes --methods pitome,random --keep 0.5,0.22
    """
    from ..benchmarks.encoders import retrieval as bench
    from ..benchmarks.encoders.towers import TwoTower
    from ..benchmarks.tasks.galleries import open_captions

    settings = _settings(methods, keep, batch_size, repeats, seed)
    task = valid(lambda: open_captions(data, samples, seed))
    towers = _load(model, device, dtype)
    if not isinstance(towers, TwoTower):
        raise Mistake(f"{model} has no text tower; vtc classify takes it")
    with ProgressBar("retrieval", quiet=as_json) as progress:
        result = valid(lambda: bench.run(towers, task, settings, progress, _call()))
    _show(result, bench.COLUMNS, out_dir / "retrieval.json", as_json)


@command
def classify(
    folder: Annotated[Path, typer.Argument(help="A folder with a subfolder for each class.")],
    model: AnyModel,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Names of the classes, a text file with one a line in the order of the sorted "
            "folders, or .json, folder to name; for timm .json, folder to output.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt of a two-tower model, {} being the name; more than once: their mean. "
            'Default: "a photo of a {}."',
            show_default=False,
        ),
    ] = None,
    methods: Methods = DEFAULT_METHODS,
    keep: Keep = DEFAULT_KEEP,
    samples: Samples = None,
    batch_size: BatchSize = 16,
    repeats: Repeats = 5,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
    out_dir: OutDir = Path("results"),
) -> None:
    """Top-1 and top-5 accuracy on a folder of classes, and agreement with the stock model.

    Zero-shot with a two-tower model, by its own outputs with a timm classifier.

    Example: vtc classify imagenet/val --model timm:vit_small_patch16_224 --methods tome
    """
    from ..benchmarks.encoders import classification as bench
    from ..benchmarks.encoders.towers import TwoTower
    from ..benchmarks.tasks.galleries import ClassFolder, class_names, class_outputs

    settings = _settings(methods, keep, batch_size, repeats, seed)
    task = valid(lambda: ClassFolder(folder, samples, seed))
    loaded = _load(model, device, dtype)
    if isinstance(loaded, TwoTower):
        names = valid(lambda: class_names(task.classes, classes))
        classifier = valid(
            lambda: bench.zero_shot(loaded, names, tuple(template or bench.TEMPLATES))
        )
        outputs = {name: i for i, name in enumerate(task.classes)}
    else:
        if template:
            raise Mistake(f"{model} reads no prompts; leave --template out")
        classifier = loaded
        outputs = valid(lambda: class_outputs(task.classes, loaded.classes, classes))
    with ProgressBar("classify", quiet=as_json) as progress:
        run = partial(bench.run, classifier, task, outputs, settings, progress, _call())
        result = valid(run)
    _show(result, bench.COLUMNS, out_dir / "classification.json", as_json)


def _call() -> str:
    return shlex.join(["vtc", *sys.argv[1:]])


def _settings(methods: str, keep: str, batch_size: int, repeats: int, seed: int) -> Any:
    from ..benchmarks.encoders.sweep import Settings
    from ..benchmarks.shared.budgets import parse_keep, seeded

    names = tuple(n.strip() for n in methods.split(",") if n.strip())
    for name in names:
        valid(lambda name=name: seeded(name, None, seed))  # type: ignore[misc]
    budgets = valid(lambda: tuple(parse_keep(k) for k in keep.split(",") if k.strip()))
    return Settings(names, budgets, batch_size, repeats, seed)


def _load(model: str, device: str, dtype: str) -> Any:
    import torch
    import transformers

    from ..benchmarks.encoders.towers import load
    from ..errors import UnsupportedError

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise Mistake(f'unknown dtype "{dtype}"; use {", ".join(kinds)}')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return load(model, device_of(device), kinds[dtype])
    except UnsupportedError:
        raise
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise Mistake(f"cannot load {model}: {first}") from None


def _show(
    result: dict[str, Any],
    columns: Sequence[Column],
    path: Path,
    as_json: bool,
) -> None:
    """Print a result as a table or as JSON, and write it."""
    from ..benchmarks.accuracy.tables import failures
    from ..benchmarks.encoders.tables import caption
    from ..benchmarks.shared.files import write_json

    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_rows(result["rows"], columns)
        for text in failures([result]):
            out.print(text, style="yellow", highlight=False, soft_wrap=True)
        out.print(caption(result), style="dim", highlight=False, soft_wrap=True)
    try:
        write_json(result, path)
    except OSError as error:
        raise Mistake(f"cannot write {path}: {error.strerror}") from None
    if not as_json:
        print_written([path])
    if not result["finished"]:
        raise typer.Exit(130)
