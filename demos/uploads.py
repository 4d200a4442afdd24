# SPDX-License-Identifier: Apache-2.0
"""Reading what a stranger uploaded: size and type are looked at before anything is decoded."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..report.images import upright_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 32_000_000
MAX_EDGE = 1280
"""Larger images are scaled down to this longer side, in pixels, before any model sees them."""
MIN_EDGE = 8


def read_image(path: str | Path) -> Image.Image:
    """The image of a file, upright, RGB, its longer side at most `MAX_EDGE` pixels.

    Raises:
        ValueError: not an image of a kind in `FORMATS`, too large or too narrow, or damaged; the
            text is for the user and names no path.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            check_size(*file.size)
            try:
                image = upright_rgb(file)
            except (OSError, SyntaxError, ValueError, EOFError) as error:
                raise ValueError("the image is damaged or cut off; save it again") from error
    except Image.DecompressionBombError:
        raise ValueError(_too_large("more than 178 megapixels")) from None
    except FileNotFoundError:
        raise ValueError("the image is no longer kept here; upload it again") from None
    except OSError:  # Pillow's "cannot identify" is one of them
        kinds = ", ".join(FORMATS).replace("WEBP", "WebP")
        raise ValueError(f"this file is not an image that is read here; use {kinds}") from None
    image.thumbnail((MAX_EDGE, MAX_EDGE))
    return image


def check_size(width: int, height: int) -> None:
    """Refuse an image (pixels) that is too large to decode or too narrow to cut into patches."""
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(f"{width * height / 1e6:.0f} megapixels ({width} x {height})"))
    scale = min(1.0, MAX_EDGE / max(width, height))
    if min(width, height) * scale < MIN_EDGE:
        raise ValueError(f"{width} x {height} pixels are too narrow; use a less extreme shape")


def _too_large(what: str) -> str:
    limit = MAX_PIXELS / 1e6
    return f"the image has {what}; at most {limit:.0f} are read here, so scale it down first"
