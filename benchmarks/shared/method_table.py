# SPDX-License-Identifier: Apache-2.0
"""The table of methods, generated from the registry."""

from __future__ import annotations

import re
import sys

from ...method import PLACES, Method
from ...registry import known_methods
from .columns import fill, markdown, words


def paper_of(cls: type[Method]) -> str:
    """The paper of a method, as its summary names it, linked if its file names it on arXiv."""
    found = re.search(r"\(([^()]* after )?([^()]*)\)$", cls.summary)
    if found is None:
        return ""
    name = re.sub(r",? (arXiv )?\d{4}\.\d{5}$", "", found[2])
    number = re.search(r"arXiv (\d{4}\.\d{5})", sys.modules[cls.__module__].__doc__ or "")
    link = f"[{name}](https://arxiv.org/abs/{number[1]})" if number else name
    return (found[1] or "") + link


def method_rows() -> list[dict[str, str]]:
    """Name, place, needs, default budget, paper and summary of every registered method."""
    rows = []
    for name, cls in known_methods().items():
        stages = cls().stages
        rows.append(
            {
                "name": name,
                "acts": ", ".join(text for stage, text in PLACES.items() if stage in stages),
                "kind": "merges" if cls.merges else "keeps",
                "needs": ", ".join(sorted(cls.needs)),
                "default": f"{100 * cls.default_ratio:g} %",
                "paper": paper_of(cls),
                "summary": cls.summary,
            }
        )
    return rows


def method_table() -> str:
    """The method table in Markdown; a method without a paper is a control."""
    columns = [
        words("method", lambda row: f"`{row['name']}`"),
        words("acts", "acts"),
        words("paper", lambda row: row["paper"] or "control"),
    ]
    return markdown(fill(columns, method_rows()))
