# SPDX-License-Identifier: Apache-2.0
"""What vtc knows: ``vtc methods``, ``vtc models``, ``vtc inspect``, ``vtc version``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from .. import __version__
from .common import AsJson, Mistake, command, out


@command
def version() -> None:
    """Versions of vtc, torch and transformers.

    Example: vtc version
    """
    import torch
    import transformers

    out.print(
        f"vtc {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


@command
def methods(
    as_json: AsJson = False,
) -> None:
    """All methods: where they act, what they need, what they do.

    Example: vtc methods --json
    """
    from ..benchmarks.catalogue import method_rows

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
def models(
    as_json: AsJson = False,
) -> None:
    """All model families that vtc has an adapter for; "vtc inspect" tells of any other.

    Example: vtc models
    """
    from ..adapters.locate import FAMILIES

    if as_json:
        print(json.dumps(FAMILIES, indent=1))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("family")
    table.add_column("classes", overflow="fold")
    for family, classes in FAMILIES.items():
        table.add_row(family, "\n".join(classes))
    out.print(table)


@command
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, folder or config.json.")],
    as_json: AsJson = False,
) -> None:
    """How vtc sees a model and which methods work on it, from its configuration alone.

    Example: vtc inspect llava-hf/llava-1.5-7b-hf
    """
    import transformers

    from ..inspecting import inspect as look

    transformers.logging.set_verbosity_error()
    try:
        found = look(model)
    except (OSError, ValueError) as error:
        from ..errors import UnsupportedError

        if isinstance(error, UnsupportedError):
            raise
        first = str(error).strip().splitlines()[0]
        raise Mistake(f"cannot read {model}: {first}") from None
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        out.print(str(found), highlight=False, soft_wrap=True)
