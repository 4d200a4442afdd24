# SPDX-License-Identifier: Apache-2.0
"""Parts that the commands share: the app, its errors, loading a model, a progress bar."""

from __future__ import annotations

import datetime
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .ending import print_traceback

if TYPE_CHECKING:
    from PIL import Image

    from ..benchmarks.shared.columns import Column

app = typer.Typer(
    help="Visual token compression for multimodal LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    traceback: Annotated[
        bool,
        typer.Option("--traceback", help="Show tracebacks, as VTC_TRACEBACK=1 does."),
    ] = False,
) -> None:
    """Accept what stands before the command; ending.py reads it, as this may fail to import."""


# Names and paths may have brackets: no markup.
out = Console(markup=False)
err = Console(stderr=True, markup=False)

EXTRAS = {
    "accelerate": "bench",
    "datasets": "data",
    "easy_vqa": "bench",
    "gradio": "demo",
    "jinja2": "bench",
    "lmms_eval": "lmms-eval",
    "matplotlib": "bench",
    "open_clip": "open-clip",
    "pyarrow": "data",
    "rapidfuzz": "bench",
    "timm": "timm",
    "torchvision": "bench",
}
"""Extra that installs a module, for those that a command may miss."""


# Options of more than one command.
Methods = Annotated[str, typer.Option(help="Names, separated by commas.")]
SomeMethods = Annotated[
    str | None, typer.Option(help="Names, separated by commas.", show_default=False)
]
Keep = Annotated[
    str, typer.Option(help="Kept shares (0.33, 1/3) or token counts, separated by commas.")
]
LLaVA = Annotated[
    str | None, typer.Option(help="Folder or hub id of a LLaVA; default: the embedded one.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions answered together.")]
Device = Annotated[str, typer.Option(help='"cpu", "cuda" or "auto".')]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Only JSON on the standard output.")]
OutDir = Annotated[Path, typer.Option("--out", help="Folder for results.")]


class Mistake(Exception):
    """Something the caller got wrong; printed as one line."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose expected errors end in one clear line and exit code 2."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from ..errors import UnsupportedError

        try:
            function(*args, **kwargs)
        except (Mistake, UnsupportedError) as error:
            if isinstance(error, UnsupportedError):
                print_traceback()
            err.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except ImportError as error:
            missing = (error.name or "").split(".")[0]
            if missing in EXTRAS and isinstance(error, ModuleNotFoundError):
                extra = f'"visual-token-compression[{EXTRAS[missing]}]"'
                text = f"{missing} is missing; pip install {extra}"
            elif type(error) is ImportError and error.name is None:
                text = str(error)  # one of ours, which says what to install
            else:
                raise
            print_traceback()
            err.print(f"error: {text}", style="red", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return app.command()(run)


def valid(function: Callable[[], Any]) -> Any:
    """Run a check of the arguments; what it refuses is the caller's mistake."""
    try:
        return function()
    except ValueError as error:
        raise Mistake(str(error)) from None
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        text = f"{error.filename}: {error.strerror}" if named else str(error)
        raise Mistake(text) from None


def device_of(name: str) -> str:
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


def load(model: str | None, embedded: str, device: str, dtype: str) -> tuple[Any, Any]:
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
            from ..benchmarks.tiny import models

            net, processor = getattr(models, embedded)(device)
        else:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            own: dict[str, Any] = {"trust_remote_code": False}  # left out, it asks
            processor = AutoProcessor.from_pretrained(model, **own)
            net = AutoModelForImageTextToText.from_pretrained(model, use_safetensors=True, **own)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise Mistake(f"cannot load {model or 'the embedded model'}: {first}") from None
    return net.to(device, kinds[dtype]).eval(), processor


def read_image(path: Path) -> Image.Image:
    """An image file as the model gets it: upright, in RGB."""
    from PIL import Image

    from ..report.images import upright_rgb

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = upright_rgb(opened)
    except FileNotFoundError:
        raise Mistake(f"no file {path}") from None
    except Image.DecompressionBombError:
        raise Mistake(f"{path} has too many pixels; make it smaller than 178 megapixels") from None
    except (OSError, SyntaxError, ValueError) as error:  # what decoders raise on broken files
        text = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise Mistake(f"cannot read {path}: {text}") from None
    if any(issubclass(w.category, Image.DecompressionBombWarning) for w in caught):
        width, height = picture.size
        err.print(f"warning: {path} is large, {width} x {height} pixels", highlight=False)
    return picture


def console(width: int) -> Console:
    """The standard output; where it is no terminal, so many characters wide."""
    return out if out.is_terminal else Console(width=width, markup=False)


def print_rows(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> None:
    """A table of result rows, the stock model first."""
    from ..benchmarks.shared.columns import fill, terminal

    console(180).print(terminal(fill(columns, rows, strong={0}), whole=len(columns)))


def print_written(paths: Iterable[Path | str]) -> None:
    """Print the paths of a command's files."""
    out.print(f"written: {', '.join(map(str, paths))}", style="dim", soft_wrap=True)


class ProgressBar:
    """Progress with the time that remains, on the standard error, or nothing.

    A bar on a terminal; elsewhere a line every half minute.
    """

    EVERY = 30.0
    """Seconds between two lines."""

    def __init__(self, title: str, quiet: bool) -> None:
        self.title, self.quiet = title, quiet
        self.lines = not quiet and not err.is_terminal
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=err,
            disable=quiet or not err.is_terminal,
            transient=True,
        )
        self.task: Any = None
        self.start: tuple[float, int] | None = None
        """When the first step began, and how many were done by an earlier run."""
        self.last = 0.0

    def __enter__(self) -> Callable[[str, int, int], None]:
        if self.lines:
            err.print(f"{self.title} ...")
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=None)
        return self._progress

    def _progress(self, text: str, done: int, total: int) -> None:
        self.bar.update(self.task, description=f"{self.title}: {text}", completed=done, total=total)
        now = time.monotonic()
        if self.start is None:
            self.start, self.last = (now, done), now
        if self.lines and now - self.last >= self.EVERY:
            self.last, (began, before) = now, self.start
            share = f"{done}/{total} ({done / total:.0%})"
            left = ""
            if done > before:
                seconds = round((now - began) / (done - before) * (total - done))
                left = f", about {datetime.timedelta(seconds=seconds)} left"
            err.print(f"{self.title}: {share}{left}; {text}", highlight=False, soft_wrap=True)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
