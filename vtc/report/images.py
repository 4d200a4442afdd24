# SPDX-License-Identifier: Apache-2.0
"""Images as models get them: upright and in RGB of 8 bits."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as EXIF says it was held, in RGB; 16 bits of grey become 8.

    Pillow's own conversion cuts 16 bits off at 255, which makes nearly every such image white.

    Raises:
        ValueError: pixels are 32-bit or floating-point numbers, whose white nobody knows; or what
            decoders raise on broken files.
    """
    image = ImageOps.exif_transpose(image)
    # Older Pillow opens 16 bits as mode "I".
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not sixteen:
        raise ValueError(
            f'pixels of mode "{image.mode}" have no known range; save the image with 8 or 16 bits '
            "a channel"
        )
    if sixteen:
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image.convert("RGB")
