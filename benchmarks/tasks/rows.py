# SPDX-License-Identifier: Apache-2.0
"""Rows of your own data: fields that are read and checked."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..metrics.scores import metric as find_metric
from .items import Entry

DEFAULT_METRIC = "one-word"
DEFAULT_KIND = "question"

DataRow = dict[str, Any]
FindImage = Callable[[int, DataRow], tuple[Hashable, Callable[[], Image.Image]]]
"""(number, row) -> key of its image, and what makes it. Raises ValueError if there is none."""


def sample(entries: list[Entry], n: int | None, seed: int, name: str) -> list[Entry]:
    """Return `n` entries drawn with `seed`, in their order; all of them if there are no more."""
    if n is None or n >= len(entries):
        return entries
    chosen = random.Random(f"{name}/{seed}").sample(range(len(entries)), n)
    return [entries[i] for i in sorted(chosen)]


def text_of(row: DataRow, field: str) -> str:
    """Return a field that must be text.

    Raises:
        ValueError: it is missing, not a string, blank or half a character.
    """
    value = row.get(field)
    if value is None:
        raise ValueError(f'"{field}" is missing')
    if not isinstance(value, str):
        raise ValueError(f'"{field}" must be a string, not {value!r:.60}')
    if not value.strip():
        raise ValueError(f'"{field}" is empty')
    value.encode()  # UnicodeEncodeError, a ValueError: a lone surrogate
    return value


def json_lines(path: Path) -> Iterator[tuple[int, DataRow | ValueError]]:
    """Line numbers from 1, with the object of the line or what is wrong with it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, _parse(line)


def check_rows(
    label: str,
    rows: Iterable[tuple[int, DataRow | ValueError]],
    find_image: FindImage,
    metric: str | None,
) -> tuple[list[Entry], str, list[tuple[str, str]]]:
    """Return the good rows, the name of their metric, and where and why the others are bad.

    Args:
        label: of the file. metric: in place of what the rows name.

    Raises:
        ValueError: there is no good row; the first three say why.
    """
    parsed: list[tuple[int, Entry, str | None]] = []
    problems: dict[int, str] = {}
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            named = None
            if metric is None and row.get("metric") is not None:
                named = find_metric(text_of(row, "metric")).name
            parsed.append((number, _entry(number, row, find_image), named))
        except ValueError as error:
            problems[number] = str(error)

    first = next((named for _, _, named in parsed if named), DEFAULT_METRIC)
    chosen = find_metric(metric or first)
    entries: dict[str, Entry] = {}
    lines: dict[str, int] = {}
    for number, entry, named in parsed:
        try:
            if named not in (None, chosen.name):
                raise ValueError(f"one file has one metric: {chosen.name!r} above, {named!r} here")
            if entry.id in lines:
                raise ValueError(f"the id {entry.id!r} is that of row {lines[entry.id]} already")
            chosen.check(entry.answers)
        except ValueError as error:
            problems[number] = str(error)
        else:
            entries[entry.id], lines[entry.id] = entry, number
    places = [(f"{label}:{number}", why) for number, why in sorted(problems.items())]
    if not entries:
        first_ones = "; ".join(f"{where}: {why}" for where, why in places[:3])
        raise ValueError(f"{label}: no row can be asked. {first_ones or 'It is empty'}")
    return list(entries.values()), chosen.name, places


def _answers(row: DataRow) -> tuple[str, ...]:
    given = [field for field in ("answer", "answers") if row.get(field) is not None]
    if len(given) != 1:
        both = "both are there" if given else "both are missing"
        raise ValueError(f'there must be either "answer" or "answers"; {both}')
    if given == ["answer"]:
        return (text_of(row, "answer"),)
    values = row["answers"]
    if not isinstance(values, list) or not values:
        raise ValueError(f'"answers" must be a list of strings, not {values!r:.60}')
    return tuple(text_of({"answers": value}, "answers") for value in values)


def _entry(number: int, row: DataRow, find_image: FindImage) -> Entry:
    key, load = find_image(number, row)
    question, answers = text_of(row, "question"), _answers(row)
    kind = text_of(row, "kind") if row.get("kind") is not None else DEFAULT_KIND
    name = number if row.get("id") is None else row["id"]
    if not isinstance(name, str | int) or name == "":
        raise ValueError(f'"id" must be a string or a whole number, not {name!r:.60}')
    return Entry(key, load, question, answers[0], kind, answers, str(name))


def _parse(line: bytes) -> DataRow | ValueError:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON, one object a line: {error.msg}, column {error.colno}")
    except RecursionError:
        return ValueError("not JSON that can be read: nested too deeply")
    except ValueError as error:  # a number of more digits than Python reads
        return ValueError(f"not JSON that can be read: {error}")
    if not isinstance(row, dict):
        return ValueError(f"must be an object with fields, not {row!r:.60}")
    return row
