# SPDX-License-Identifier: Apache-2.0
"""Blocks of a Markdown file between markers, which programs write."""

from __future__ import annotations

import re
from pathlib import Path


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)


def read_block(path: Path, name: str) -> str:
    """The text between the markers of a block.

    Raises:
        ValueError: the file has no such block.
    """
    found = _pattern(name).search(path.read_text("utf-8"))
    if found is None:
        raise ValueError(f"{path} has no block <!-- {name}:begin --> ... <!-- {name}:end -->")
    return found[0].split("-->\n", 1)[1].rsplit("<!--", 1)[0].strip()


def fill_block(path: Path, name: str, text: str) -> None:
    """Replace the text between the markers of a block.

    Raises:
        ValueError: the file has no such block.
    """
    read_block(path, name)
    before = path.read_text("utf-8")
    after = _pattern(name).sub(lambda m: f"{m[1]}{text.strip()}\n{m[2]}", before, count=1)
    path.write_text(after, "utf-8")
