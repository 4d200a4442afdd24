# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: `LlavaOnevisionForConditionalGeneration`, crops without [CLS], and videos.

Images are laid out like LLaVA-NeXT's, except that a canvas of too many patches is resampled
bilinearly, and that an image beside others in one sample may come without crops. Each frame of a
video shrinks to half its edges bilinearly behind the projector; a newline ends the video.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .base import CropSites, GridSites, Sites
from .grids import frame_grids
from .llava import decoder_sites
from .llava_next import crop_sites

NO_LIMIT = "anyres_max_1000000"
"""An aspect ratio setting under which no canvas is resampled."""


def _images(crops: CropSites, call: dict[str, Any]) -> list[tuple[tuple[int, int], int]]:
    found, together = crops.images(call), call.get("batch_num_images")
    if together is None:
        return found
    alone = [int(n) == 1 for n in together for _ in range(int(n))]
    return [(size, n if a else 1) for (size, n), a in zip(found, alone, strict=True)]


def _pack(
    base: Any,
    features: Tensor,
    size: tuple[int, int],
    newline: Tensor,
    call: dict[str, Any],
    fit: bool,
) -> Tensor:
    limit = call.get("vision_aspect_ratio") or base.config.vision_aspect_ratio
    limit = limit if fit else NO_LIMIT
    return type(base).pack_image_features(base, [features], [size], newline, limit)[0][0]


def _half(edge: int) -> int:
    return (edge + 1) // 2


def onevision_crops(base: Any) -> CropSites:
    """`crop_sites` with the two differences to LLaVA-NeXT."""
    crops = crop_sites(base)
    return replace(crops, images=partial(_images, crops), pack=partial(_pack, base))


def locate(model: Any) -> Sites | None:
    """Sites of a LLaVA-OneVision model, None for any other."""
    if type(model).__name__ != "LlavaOnevisionForConditionalGeneration":
        return None
    from .locate import locate_vision

    base = model.model
    vision = locate_vision(base.vision_tower)
    sites = decoder_sites(model, base, vision)
    projector = base.multi_modal_projector
    videos = GridSites(
        images=frame_grids(vision.patch),
        source=projector,
        project=projector.forward,
        newlines=1,
        shrink=_half,
    )
    sites = replace(
        sites,
        tokens_per_image=None,
        crops=onevision_crops(base),
        video=True,
        videos=videos,
        video_ids=(model.config.video_token_id,),
    )
    return Sites("LLaVA-OneVision", vision, sites)
