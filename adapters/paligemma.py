# SPDX-License-Identifier: Apache-2.0
"""PaliGemma: `PaliGemmaForConditionalGeneration`, SigLIP, a linear projector, a prefix mask.

Every patch is an LLM token, as in LLaVA. The prompt is one bidirectional block, for which the model
makes an ordinary mask of all tokens, whose rows and columns are gathered like any other.
"""

from __future__ import annotations

from typing import Any

from .base import Sites, language_sites


def locate(model: Any) -> Sites | None:
    """Sites of a PaliGemma model, None for any other."""
    if type(model).__name__ != "PaliGemmaForConditionalGeneration":
        return None
    from .locate import locate_vision

    base = model.model
    vision = locate_vision(base.vision_tower)
    edge = model.config.vision_config.image_size // vision.patch
    sites = language_sites(
        model,
        base,
        base.language_model,
        base.multi_modal_projector,
        len(vision.blocks) - 1,
        tokens_per_image=edge**2,
    )
    return Sites("PaliGemma", vision, sites)
