# SPDX-License-Identifier: Apache-2.0
"""Commands on what vtc knows: ``vtc methods``, ``vtc models``, ``vtc inspect``, ``vtc version``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
from typing import Annotated

import typer

from .. import __version__
from .common import AsJson, Mistake, command, out

LIBRARIES = (
    "torch",
    "transformers",
    "torchvision",
    "accelerate",
    "timm",
    "open-clip-torch",
    "gradio",
)


@command
def version() -> None:
    """Versions of vtc and its libraries; fails where one of the large ones cannot be imported.

    Example: vtc version
    """
    for name in ("torch", "torchvision", "transformers"):
        if name != "torchvision" or importlib.util.find_spec(name):
            importlib.import_module(name)
    importlib.import_module("vtc.transformers_contract")  # classes that a release may have moved
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    python = platform.python_version()
    versions = [f"{name} {release}" for name, release in found.items()]
    out.print(", ".join([f"vtc {__version__}", *versions, f"Python {python}"]), soft_wrap=True)


@command
def methods(
    as_json: AsJson = False,
) -> None:
    """All methods: where they act, what they need, what they do.

    Example: vtc methods --json
    """
    from ..benchmarks.shared.columns import fill, terminal, words
    from ..benchmarks.shared.method_table import method_rows

    rows = method_rows()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    columns = [
        words("method", "name"),
        words("acts", "acts"),
        words("needs", "needs"),
        words("default keep", "default"),
        words("what it does", "summary"),
    ]
    out.print(terminal(fill(columns, rows), overflow="fold"))


@command
def models(
    as_json: AsJson = False,
) -> None:
    """All model families that vtc has an adapter for; "vtc inspect" tells of any other.

    Example: vtc models
    """
    from ..adapters.locate import FAMILIES
    from ..benchmarks.shared.columns import fill, terminal, words

    if as_json:
        print(json.dumps(FAMILIES, indent=1))
        return
    columns = [
        words("family", lambda item: item[0]),
        words("classes", lambda item: "\n".join(item[1])),
    ]
    out.print(terminal(fill(columns, FAMILIES.items()), overflow="fold"))


@command
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, folder or config.json.")],
    as_json: AsJson = False,
) -> None:
    """How vtc sees a model and which methods work on it, from its configuration alone.

    Example: vtc inspect llava-hf/llava-1.5-7b-hf
    """
    import transformers

    from ..inspection import inspect as look

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
