# SPDX-License-Identifier: Apache-2.0
"""Rows of a Parquet file, whose images are read only when they are wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from .files import Encoded, Row, find_file, image_path

FIELDS = ("question", "answer", "answers", "id", "kind", "metric")


class ParquetFile:
    """A file with a column `image`: paths, encoded bytes, or structs of both as `datasets` writes.

    Rows count from 1. The images of one row group are held at a time: groups of a hundred rows, as
    `datasets` writes them, are a good size.

    Raises:
        ValueError: not a Parquet file, or without such a column.
        ImportError: pyarrow is not installed.
    """

    def __init__(self, path: Path):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ImportError(
                'Parquet files need: pip install "visual-token-compression[data]"'
            ) from error
        self.path = path
        try:
            self.file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: cannot be read as a Parquet file: {error}") from error
        schema = self.file.schema_arrow
        kind = schema.field("image").type if "image" in schema.names else pa.null()
        self.paths = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if not (self.paths or binary or pa.types.is_struct(kind)):
            columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
            raise ValueError(
                f'{path}: needs a column "image" of paths, bytes or structs of "bytes" and "path"; '
                f"its columns are {columns}"
            )
        wanted = (*FIELDS, "image") if self.paths else FIELDS
        self.columns = [name for name in schema.names if name in wanted]
        metadata = self.file.metadata
        sizes = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        self.starts = list(accumulate(sizes, initial=0))
        self._held: Any = (-1, None)
        self.encoded = Encoded(path.name, self._bytes)

    def rows(self) -> Iterator[tuple[int, Row | ValueError]]:
        """Row numbers, with the fields of the row or what is wrong with it; no images' bytes."""
        number = 0
        for batch in self.file.iter_batches(columns=self.columns):
            for i in range(batch.num_rows):
                number += 1
                try:
                    yield number, {c: batch.column(c)[i].as_py() for c in self.columns}
                except UnicodeDecodeError as error:
                    yield number, ValueError(f"not UTF-8: {error}")

    def find_image(self, number: int, row: Row) -> Any:
        """Key and maker of the image of a row, as `files.find_file` returns them."""
        if self.paths:
            return find_file(self.path, "image", number, row)
        return number, partial(self.encoded.load, number)

    def _bytes(self, number: int) -> bytes:
        group = bisect_right(self.starts, number - 1) - 1
        if self._held[0] != group:
            column = self.file.read_row_group(group, columns=["image"]).column("image")
            self._held = (group, column)
        value: Any = self._held[1][number - 1 - self.starts[group]].as_py()
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
            value = image_path(self.path, path).read_bytes() if path and not value else value
        if not value:
            raise ValueError("there is no image")
        return value
