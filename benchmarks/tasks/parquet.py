# SPDX-License-Identifier: Apache-2.0
"""Rows of Parquet files, whose images are read only when they are wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from .images import Encoded, find_file, image_path
from .rows import DataRow

FIELDS = ("question", "answer", "answers", "id", "kind", "metric")
HELD = 4
"""Row groups whose images are in memory: groups of a hundred rows are a good size."""


class ParquetTable:
    """The rows of one or more files with the same columns; numbers count from 1.

    Args:
        files: paths, or URLs that `fsspec` reads in pieces, such as hf://.

    Raises:
        ValueError: one that is not a Parquet file.
        ImportError: pyarrow is not installed.
    """

    def __init__(self, files: Sequence[str | Path]):
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ImportError(
                'Parquet files need: pip install "visual-token-compression[data]"'
            ) from error
        self.groups: list[tuple[Any, int]] = []
        sizes = []
        for name in files:
            try:
                file = pq.ParquetFile(_source(name))
            except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
                raise ValueError(f"{name}: cannot be read as a Parquet file: {error}") from error
            self.groups += [(file, i) for i in range(file.num_row_groups)]
            sizes += [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.schema = file.schema_arrow
        self.starts = list(accumulate(sizes, initial=1))
        self._held = lru_cache(maxsize=HELD)(self._read)

    def size(self, group: int) -> int:
        """How many rows a row group has."""
        return self.starts[group + 1] - self.starts[group]

    def rows(
        self, columns: Sequence[str], groups: Iterable[int] | None = None
    ) -> Iterator[tuple[int, DataRow | ValueError]]:
        """Numbers of the rows, of all row groups or some, with their fields or what is wrong."""
        for group in range(len(self.groups)) if groups is None else groups:
            number = self.starts[group]
            file, index = self.groups[group]
            for batch in file.iter_batches(row_groups=[index], columns=list(columns)):
                for i in range(batch.num_rows):
                    try:
                        yield number, {c: batch.column(c)[i].as_py() for c in columns}
                    except UnicodeDecodeError as error:
                        yield number, ValueError(f"not UTF-8: {error}")
                    number += 1

    def image(self, number: int, source: Path | None = None) -> bytes:
        """The encoded image of a row.

        Args:
            source: the file that its path counts from if the table has no bytes.

        Raises:
            ValueError, OSError: there is none.
        """
        group = bisect_right(self.starts, number) - 1
        value: Any = self._held(group)[number - self.starts[group]].as_py()
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
            if path and source and not value:
                value = image_path(source, path).read_bytes()
        if not value:
            raise ValueError("there is no image")
        return value

    def _read(self, group: int) -> Any:
        file, index = self.groups[group]
        return file.read_row_group(index, columns=["image"]).column("image")


def _source(name: str | Path) -> Any:
    if "://" not in str(name):
        return name
    import fsspec

    return fsspec.open(str(name)).open()


class ParquetFile:
    """A file of one's own with a column `image`: paths, bytes, or structs as of `datasets`.

    Raises:
        ValueError: not a Parquet file, or without such a column.
        ImportError: pyarrow is not installed.
    """

    def __init__(self, path: Path):
        self.path, self.table = path, ParquetTable([path])
        import pyarrow.types as types

        schema = self.table.schema
        kind = schema.field("image").type if "image" in schema.names else None
        self.paths = kind is not None and (types.is_string(kind) or types.is_large_string(kind))
        binary = kind is not None and (
            types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)
        )
        if not self.paths and not binary:
            columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
            raise ValueError(
                f'{path}: needs a column "image" of paths, bytes or structs of "bytes" and "path"; '
                f"its columns are {columns}"
            )
        self.encoded = Encoded(path.name, partial(self.table.image, source=path))

    def rows(self, fields: Sequence[str] = FIELDS) -> Iterator[tuple[int, DataRow | ValueError]]:
        """Row numbers, with those of the fields that there are or what is wrong with the row."""
        wanted = (*fields, "image") if self.paths else fields
        return self.table.rows([c for c in self.table.schema.names if c in wanted])

    def find_image(self, number: int, row: DataRow) -> Any:
        """Key and maker of the image of a row, as `files.find_file` returns them."""
        if self.paths:
            return find_file(self.path, "image", number, row)
        return number, partial(self.encoded.load, number)
