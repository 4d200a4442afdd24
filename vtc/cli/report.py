# SPDX-License-Identifier: Apache-2.0
"""``vtc report``: result files as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Mistake, command, err, print_written, valid


@command
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files, or folders of them.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path(
        "results"
    ),
) -> None:
    """One HTML page that loads nothing, and Markdown, from the result files of all benchmarks.

    Example: vtc report results --out results
    """
    from ..benchmarks.pages.html import write

    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"cannot write {out_dir}: {error.strerror}") from None
    written, refused = valid(lambda: write(results, out_dir))
    for where, why in refused:
        err.print(f"not read: {where}: {why}", highlight=False, soft_wrap=True)
    print_written(written)
