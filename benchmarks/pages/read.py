# SPDX-License-Identifier: Apache-2.0
"""Result files as one report: what each of them says, ready for `html` to write.

`read` takes result files of any age, `sections` makes a `Section` of each: tables, figures, notes
and where it comes from. Nothing is computed that the files do not hold; what is missing in a file
is missing in its section, and a section says what was skipped and whether a run was finished.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..shared.provenance import chip, facts, kind_of, part_of
from .kinds import BUILD
from .parts import Figure, Result, Section, rounded


def read(paths: Iterable[Path]) -> tuple[list[tuple[Path, Result]], list[tuple[str, str]]]:
    """Result files, and those of a folder's JSON files that are none, each with the reason.

    Raises:
        ValueError: no result file among them; the message says why.
    """
    found: list[tuple[Path, Result]] = []
    refused: list[tuple[str, str]] = []
    for path in paths:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            refused.append((str(path), "a folder without .json files"))
        for file in inside:
            try:
                found.append((file, _checked(json.loads(file.read_text("utf-8")))))
            except OSError as error:
                refused.append((str(file), error.strerror or str(error)))
            except (ValueError, RecursionError) as error:
                refused.append((str(file), f"no result file: {error}"))
    if not found:
        why = "; ".join(f"{where}: {reason}" for where, reason in refused) or "no path was given"
        raise ValueError(f"nothing to report: {why}")
    return found, refused


def _checked(result: Any) -> Result:
    if not isinstance(result, dict):
        raise ValueError("not a JSON object")
    kind = kind_of(result)
    if kind not in BUILD:
        raise ValueError(f'"benchmark" is "{kind}", none of {", ".join(BUILD)}')
    rows = result.get("parts" if kind == "speed" else "rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("no rows")
    return result


def sections(results: Sequence[tuple[Path, Result]]) -> list[Section]:
    """A section for each result, in order of the benchmarks and of the files."""
    order = list(BUILD)
    ranked = sorted(results, key=lambda pair: order.index(kind_of(pair[1])))
    return [_section(path, result) for path, result in ranked]


def _section(path: Path, result: Result) -> Section:
    kind, task = kind_of(result), str(result.get("task", ""))
    usual = path.stem in (task, f"{kind}-{task}")
    name = task if usual else f"{task} ({path.stem})" if task else path.stem
    section = Section(name if kind == "task" else f"{kind}: {name}", str(path))
    section.facts, section.notes = facts(result), _missing(result)
    try:
        BUILD[kind](section, result)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        section.notes.append(f"the rest of this file cannot be shown: {error!r}")
    section.notes = list(dict.fromkeys(map(rounded, section.notes)))
    section.figures += _pictures(path)
    section.brief = _brief(section, result)
    return section


def _brief(section: Section, result: Result) -> dict[str, str]:
    left_out = sum(len(result.get(key) or ()) for key in ("skipped", "problems"))
    state = "finished" if result.get("finished", True) else "not finished"
    return {
        "date": str(result.get("date", ""))[:10],
        "model": str(part_of(result, "model").get("name", "")),
        "machine": chip(result),
        "rows": str(len(section.tables[0].rows)) if section.tables else "0",
        "state": f"{state}, {left_out} left out" if left_out else state,
    }


def _missing(result: Result) -> list[str]:
    """What was not finished, skipped, refused or not written."""
    out = (
        []
        if result.get("finished", True)
        else ["Not finished: figures are of what ran until then."]
    )
    names = {"skipped": "could not be read", "problems": "rows refused", "unwritten": "not written"}
    for key, what in names.items():
        found = [x for x in result.get(key) or () if isinstance(x, dict)]
        if found:
            shown = "; ".join(f"{x.get('where')}: {x.get('why')}" for x in found[:5])
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            out.append(f"{len(found)} {what}: {shown}{more}")
    return out


def _pictures(path: Path) -> list[Figure]:
    """The overlays beside a result file, made small enough for a page."""
    out = []
    for file in sorted(path.parent.glob(f"{path.stem}-kept*.png")):
        try:
            with Image.open(file) as image:
                small = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue
        small.thumbnail((1400, 4000))
        data = io.BytesIO()
        small.save(data, "JPEG", quality=85)
        text = base64.b64encode(data.getvalue()).decode()
        out.append(Figure(f"What was kept ({file.name})", picture=f"data:image/jpeg;base64,{text}"))
    return out
