# SPDX-License-Identifier: Apache-2.0
"""Your own data: a .jsonl file, a .parquet file or an image folder; docs/data.md has the fields.

Every row is checked when the file is opened, without decoding its image. A row that cannot be asked
goes to `Questions.problems` with its place and the reason, and the others are asked. An image that
turns out to be broken raises `BadItem` when its item is taken.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ...images import upright_rgb
from ..metrics import metric as find_metric
from .base import BadItem, Entry, Questions

FORMATS = (".jsonl", ".parquet")
DEFAULT_METRIC = "one-word"
DEFAULT_KIND = "question"
METADATA = "metadata.jsonl"

Row = dict[str, Any]
FindImage = Callable[[int, Row], tuple[Hashable, Callable[[], Image.Image]]]
"""(number, row) -> key of its image, and what makes it. Raises ValueError if there is none."""


def open_path(
    path: Path, n: int | None = None, seed: int = 0, metric: str | None = None
) -> Questions:
    """Open a file or an image folder.

    Args:
        n: as many rows, drawn with `seed` from the good ones and asked in the file's order; None,
            or more than there are: all.
        metric: in place of the one that the rows name; "one-word" if they name none.

    Raises:
        ValueError: no such file, or not one row that can be asked; the first three say why.
    """
    source, field = (path / METADATA, "file_name") if path.is_dir() else (path, "image")
    if path.is_dir() and not source.is_file():
        raise ValueError(
            f"{path}: there is no {METADATA}, so there are no questions. A folder with a subfolder "
            "of images for each class is for vtc classify"
        )
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if source.suffix == ".parquet":
        from .parquet import ParquetFile

        table = ParquetFile(source)
        rows, find_image, more = table.rows(), table.find_image, {"key_of": table.encoded.key}
    else:
        rows, find_image, more = json_lines(source), partial(find_file, source, field), {}
    try:
        entries, found, problems = check_rows(source.name, rows, find_image, metric)
    except OSError as error:
        raise ValueError(f"{source}: cannot be read: {error}") from error
    name = path.resolve().name if path.is_dir() else path.stem
    return Questions(name, sample(entries, n, seed, name), found, seed, problems, **more)


def sample(entries: list[Entry], n: int | None, seed: int, name: str) -> list[Entry]:
    """Return `n` entries drawn with `seed`, in their order; all of them if there are no more."""
    if n is None or n >= len(entries):
        return entries
    chosen = random.Random(f"{name}/{seed}").sample(range(len(entries)), n)
    return [entries[i] for i in sorted(chosen)]


def open_image(source: Path | bytes, where: str) -> Image.Image:
    """Decode an image, upright (EXIF) and in RGB.

    Raises:
        BadItem: it cannot be read, is cut short (but for `ImageFile.LOAD_TRUNCATED_IMAGES`), or has
            more pixels than Pillow takes for harmless.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return upright_rgb(image)
    except Exception as error:  # of broken images, decoders raise nearly anything
        name = "its bytes" if isinstance(source, bytes) else source
        reason = str(error) or type(error).__name__
        raise BadItem(f"{where}: cannot read {name} as an image: {reason}") from error


def image_path(source: Path, name: str) -> Path:
    """Return where an image lies; a relative path counts from the folder of the file.

    Raises:
        ValueError: no such file, or a relative path that leads out of the folder.
    """
    relative = os.path.normpath(name)
    if relative.split(os.sep)[0] == os.pardir:
        raise ValueError(
            f"the image {name} lies outside the folder of {source.name}; write its absolute path"
        )
    path = source.parent / relative
    if not os.path.isfile(path):  # Path.is_file raises for some names
        raise ValueError(f"there is no image {path}")
    return path


def find_file(source: Path, field: str, number: int, row: Row) -> Any:
    """Return key and maker of an image that a row gives by its path."""
    path = image_path(source, text_of(row, field))
    key = os.path.normpath(row[field])
    return key, partial(open_image, path, f"{source.name}:{number}")


class Encoded:
    """Images that a table holds as bytes, read by row number when they are wanted.

    Args:
        label: of the table. read: returns the bytes of a row, from a file or over the network.
    """

    def __init__(self, label: str, read: Callable[[int], bytes]):
        self.label, self.read = label, read

    def load(self, number: int) -> Image.Image:
        """Decode the image of a row; `BadItem` if that cannot be done."""
        where = f"{self.label}:{number}"
        try:
            data = self.read(number)
        except Exception as error:  # file systems of the network raise kinds of their own
            raise BadItem(f"{where}: {error}") from error
        return open_image(data, where)

    def key(self, image_id: Hashable) -> Hashable:
        """Return a hash of the bytes of a row, given its number; any other key as it is."""
        if not isinstance(image_id, int):
            return image_id
        try:
            return hashlib.blake2b(self.read(image_id), digest_size=16).hexdigest()
        except Exception:  # as above; taking the item will say so
            return image_id


def text_of(row: Row, field: str) -> str:
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


def json_lines(path: Path) -> Iterator[tuple[int, Row | ValueError]]:
    """Line numbers from 1, with the object of the line or what is wrong with it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, _parse(line)


def check_rows(
    label: str,
    rows: Iterable[tuple[int, Row | ValueError]],
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


def _answers(row: Row) -> tuple[str, ...]:
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


def _entry(number: int, row: Row, find_image: FindImage) -> Entry:
    key, load = find_image(number, row)
    question, answers = text_of(row, "question"), _answers(row)
    kind = text_of(row, "kind") if row.get("kind") is not None else DEFAULT_KIND
    name = number if row.get("id") is None else row["id"]
    if not isinstance(name, str | int) or name == "":
        raise ValueError(f'"id" must be a string or a whole number, not {name!r:.60}')
    return Entry(key, load, question, answers[0], kind, answers, str(name))


def _parse(line: bytes) -> Row | ValueError:
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
