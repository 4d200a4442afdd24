# SPDX-License-Identifier: Apache-2.0
"""The placeholders of a prompt: where they stand, and which token of which image each is."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...adapters.base import DecoderSites
from ...errors import UnsupportedError
from ...transformers_contract import EMBEDS, VIDEOS, features_of
from ..handoff import Handoff
from .prompt import Layout, even_images, in_prompt_order, split_images, split_lengths, split_packed


class Placeholders:
    """The placeholders of one model's prompts.

    Args:
        sites: where things are in the model.
        handoff: tells how many rows each image has.

    Attributes:
        by_length: whether only those lengths tell which placeholders are one image.
    """

    def __init__(self, sites: DecoderSites, handoff: Handoff) -> None:
        self.sites, self.handoff = sites, handoff
        self.by_length = sites.crops is not None or (
            sites.grids is not None and sites.tokens_per_image is None
        )

    def find(self, ids: Tensor | None, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """By modality, (B, L) bool."""
        sites = self.sites
        found = {"image": self._places(ids, kwargs, sites.token_ids)}
        if sites.videos is not None:
            found["video"] = self._places(ids, kwargs, sites.video_ids)
        return found

    def _places(
        self, ids: Tensor | None, kwargs: Mapping[str, Any], tokens: tuple[int, ...]
    ) -> Tensor:
        """(B, L) bool, where these tokens stand in the prompt."""
        if ids is not None:
            visual = torch.zeros_like(ids, dtype=torch.bool)
            for token in tokens:
                visual |= ids == token
            return visual
        embeds = EMBEDS.of(kwargs)
        table = self.sites.base.get_input_embeddings()
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        for token in tokens:
            row = table(torch.tensor(token, device=embeds.device)).to(embeds.dtype)
            visual |= (embeds == row).all(-1)
        return visual

    def check_videos(self, module: Any, encoded: Mapping[str, Any], kwargs: Any) -> None:
        """Refuse videos of a model whose videos no adapter knows."""
        if not self.sites.video or self.sites.videos is not None:
            return
        if encoded.get("video") is not None or VIDEOS.of(kwargs) is not None:
            raise UnsupportedError(
                f"{type(module).__name__}: videos of this model are not supported, only images; "
                "call vtc.unwrap(model) for this prompt"
            )

    def take_lengths(self, module: Any, encoded: Mapping[str, Any], layouts: Any) -> None:
        """Rows of images encoded before the prompt; of others none, until they are.

        Args:
            layouts: of the whole images that were encoded last, None where they have none.
        """
        self.handoff.lengths = lengths = {
            kind: [prod(f.shape[:-1]) for f in features_of(output, module)]
            for kind, output in encoded.items()
            if output is not None and (kind == "image" or self.sites.videos is not None)
        }
        whole = {layout.length for layout in layouts or ()}
        if whole and not whole.issuperset(lengths.get("image", ())):
            raise UnsupportedError(
                f"got the features of {sum(lengths['image'])} image tokens that are not "
                "whole images: part of an image in one forward (chunked prefill) cannot be "
                "compressed; prefill in one piece, or use vtc.compress_inputs"
            )

    def even(self, visual: Tensor) -> Layout | None:  # pragma: no cover (traced)
        """Under torch.compile, the layout that shapes tell; None without images."""
        if self.handoff.encoded is None or visual.shape[1] == 1:
            return None
        each = self.sites.tokens_per_image
        if each is None:
            raise UnsupportedError(
                "torch.compile of the whole model needs images of one size, whose number of tokens "
                "is known beforehand; compile the language model alone "
                "(model.get_decoder().compile()), or the stock model on vtc.compress_inputs"
            )
        return even_images(visual, self.handoff.encoded, each)

    def runs(self, visual: Tensor) -> Layout:
        """The layout that runs of placeholders tell."""
        return split_images(visual, self.sites.tokens_per_image)

    def split(
        self, masks: dict[str, Tensor], embeds: Tensor
    ) -> tuple[list[list[int]], Tensor, Tensor, list[list[str]], Tensor | None]:
        """The token of which image each placeholder is, and (B, L) those that are newlines."""
        sites, parts = self.sites, {}
        separators: list[Tensor] = []
        for kind, mask in masks.items():
            lengths = self.handoff.lengths.get(kind, [])
            if not self.by_length:
                parts[kind] = self.runs(mask)
            elif kind == "video" or sites.crops is None:
                self._check_whole(kind, mask, lengths)
                parts[kind] = split_lengths(mask, lengths)
                grids: Any = sites.videos if kind == "video" else sites.grids
                if grids.newlines:
                    images, image, position = parts[kind]
                    table = torch.tensor([n for row in images for n in row], device=mask.device)
                    every = torch.zeros_like(position)
                    every[mask] = table.repeat_interleave(table)
                    ends = mask & (position >= every - grids.newlines)
                    images = [[n - grids.newlines for n in row] for row in images]
                    parts[kind] = images, image.where(~ends, -1), position.where(~ends, 0)
                    separators.append(ends)
            else:
                newline = sites.crops.newline().to(embeds)
                ends = mask & (embeds == newline).all(-1).to(mask.device)
                parts[kind] = split_packed(mask, ends, lengths, prod(sites.crops.side))
                separators.append(ends)
        separator = torch.stack(separators).any(0) if separators else None
        return *in_prompt_order(parts), separator

    def check_ends(self, visual: Tensor) -> None:
        """Refuse placeholders (B, L) at an end of a prompt where others stand around each image."""
        if self.sites.delimited and bool(visual[:, [0, -1]].any()):
            raise UnsupportedError(
                "found image tokens at an end of the prompt, and this model has others in front of "
                "and behind each image: part of an image in one forward (chunked prefill) cannot "
                "be compressed; prefill in one piece, or use vtc.compress_inputs"
            )

    def _check_whole(self, kind: str, mask: Tensor, lengths: list[int]) -> None:
        """Refuse features that a chunked prefill has cut up: at an end, and of no length made."""
        known = {n for made, n in self.handoff.made if made == kind}
        if known and not known.issuperset(lengths) and bool(mask[:, [0, -1]].any()):
            raise UnsupportedError(
                f"found features of {kind}s of {min(set(lengths) - known)} rows at an end of the "
                f"prompt, where whole ones have {sorted(known)}: part of one in one forward "
                "(chunked prefill) cannot be compressed; prefill in one piece"
            )
