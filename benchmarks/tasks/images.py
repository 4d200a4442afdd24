# SPDX-License-Identifier: Apache-2.0
"""Images of your own data: found beside a file or held in a row, and opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ...report.images import upright_rgb
from .items import BadItem
from .rows import DataRow, text_of


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


def find_file(source: Path, field: str, number: int, row: DataRow) -> Any:
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
