# SPDX-License-Identifier: Apache-2.0
"""What a report is made of: sections with tables, figures and notes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..shared.columns import Table

Row = dict[str, Any]
Result = dict[str, Any]


@dataclass
class Figure:
    """A drawing as SVG, or a picture as a data URI."""

    title: str
    svg: str = ""
    picture: str = ""


@dataclass
class Section:
    """What one result file says.

    Attributes:
        brief: what the table at the top says of it, by heading.
        facts: name and text of where it comes from, the command first.
        notes: sentences: what was skipped, refused, not finished, where compression does not pay.
    """

    title: str
    source: str
    brief: dict[str, str] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def rounded(words: str) -> str:
    """Text with the long fractions in it, such as 0.2222222222222222, rounded to four digits."""
    return re.sub(r"\d*\.\d{6,}", lambda found: f"{float(found[0]):.4g}", words)
