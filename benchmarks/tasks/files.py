# SPDX-License-Identifier: Apache-2.0
"""Your own data: a .jsonl file, a .parquet file or an image folder; docs/data.md has the fields.

Every row is checked when the file is opened, without decoding its image. A row that cannot be asked
goes to `Questions.problems` with its place and the reason, and the others are asked. An image that
turns out to be broken raises `BadItem` when its item is taken.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .images import find_file
from .items import Questions
from .parquet import ParquetFile
from .rows import check_rows, json_lines, sample

FORMATS = (".jsonl", ".parquet")

METADATA = "metadata.jsonl"


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
