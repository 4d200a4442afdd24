# SPDX-License-Identifier: Apache-2.0
"""The text of a prompt in a space that patches can be compared in, such as CLIP's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..views.features import FeaturesView
from ._common import unit


@dataclass(frozen=True, eq=False)
class TextQuery:
    """Embedding of the prompts, in a space that patches can be compared in.

    Attributes:
        embedding: (1, P), the same for every image, or (images, P) for the images of a forward, in
            order, however many crops they have; or a function that gives it, called at each
            forward.
        project: encoder features (B, N, C) to (B, N, P).
        label: what reports show.
    """

    embedding: Tensor | Callable[[], Tensor] = field(repr=False)
    project: Callable[[Tensor], Tensor] = field(repr=False)
    label: str = "given"

    def similarity(self, v: FeaturesView) -> Tensor:
        """(B, N) cosine of every patch to the text of its image.

        Raises:
            ValueError: as many texts as neither one nor the images.
        """
        text = self.embedding() if callable(self.embedding) else self.embedding
        images = len(v.features) if v.images is None else v.images
        if text.dim() != 2 or len(text) not in (1, images):
            raise ValueError(
                f"the text embedding has shape {tuple(text.shape)} and there are {images} "
                "images; give (1, P) for one prompt about all, or one row for each image"
            )
        if len(text) > 1 and v.image is not None:
            text = text[v.image.to(text.device)]
        patches = unit(self.project(v.features)).to(v.features.device)
        return (patches * unit(text).to(patches.device)[:, None]).sum(2)


@torch.no_grad()
def embed_text(clip: Any, tokenizer: Any, prompts: str | Sequence[str]) -> Tensor:
    """(prompts, P) embeddings by CLIP's text tower, the mean over pieces of the length it takes."""
    config = getattr(clip.config, "text_config", clip.config)
    room = config.max_position_embeddings - 2
    device = clip.text_projection.weight.device
    out = []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        pieces = [ids[i : i + room] for i in range(0, max(len(ids), 1), room)]
        embedded = []
        for piece in pieces:
            row = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            pooled = clip.text_model(input_ids=torch.tensor([row], device=device)).pooler_output
            embedded.append(clip.text_projection(pooled))
        out.append(torch.cat(embedded).mean(0))
    return torch.stack(out)


def clip_projection(clip: Any) -> Callable[[Tensor], Tensor]:
    """Final norm and visual projection of a CLIP model, for patches as for its class token."""
    vision = getattr(clip, "vision_model", None)
    if vision is None or getattr(clip, "visual_projection", None) is None:
        raise UnsupportedError(
            f"{type(clip).__name__} has no vision tower and visual projection to compare patches "
            "with; give a CLIPModel, or project=, a function of features (B, N, C) to (B, N, P)"
        )
    weight = clip.visual_projection.weight

    @torch.no_grad()
    def project(features: Tensor) -> Tensor:
        x = features.to(weight.device, weight.dtype)
        return clip.visual_projection(vision.post_layernorm(x))

    return project
