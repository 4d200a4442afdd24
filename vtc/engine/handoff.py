# SPDX-License-Identifier: Apache-2.0
"""The handoff: all that the encoder side tells the LLM side of the images of a forward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..hooks.per_thread import PerThread, Threaded

Notes = dict[str, tuple[Sequence[Tensor], list[dict[str, Any]]]]
"""By modality, for each image its projected features (N, D) and each method's notes on them
(K, ...)."""


class Handoff(Threaded):
    """What is left of the images that were encoded; each thread has its own.

    Attributes:
        encoded: images of this forward where the projector ran in it.
        left: features left of each of them, None: all.
        lengths: by modality, rows of each image of this forward, in the order of its placeholders.
        made: by modality, rows of whole images that were ever made.
        notes: what methods noted on the features.
    """

    encoded: PerThread[int | None] = PerThread(lambda: None)
    left: PerThread[int | None] = PerThread(lambda: None)
    lengths: PerThread[dict[str, list[int]]] = PerThread(dict)
    made: PerThread[set[tuple[str, int]]] = PerThread(set)
    notes: PerThread[Notes] = PerThread(dict)
    # The pixels of the video that is being encoded.
    video: PerThread[weakref.ref[Tensor] | None] = PerThread(lambda: None)

    def images(self, features: Any, left: int | None, notes: list[dict[str, Any]]) -> None:
        """Hand over images of one size, (B, N, D) in the space of the LLM.

        Args:
            left: rows left of each, None: all; notes: of each method, empty where it has none.
        """
        self.encoded, self.left = len(features), left
        self.notes = {"image": (features, notes)} if any(notes) else {}

    def rows(self, modality: str, lengths: list[int]) -> None:
        """Hand over how many rows each image or video has, whatever is left of it."""
        self.lengths[modality] = lengths
        self.made |= {(modality, n) for n in lengths}
        self.notes.pop(modality, None)

    def note(self, modality: str, features: list[Tensor], notes: list[dict[str, Any]]) -> None:
        """Hand over notes on the features (K, D) that are left of each image."""
        self.notes[modality] = features, notes

    @contextmanager
    def encoding_video(self, pixels: Tensor) -> Iterator[None]:
        """Around the encoder's run on a video."""
        self.video = weakref.ref(pixels)
        try:
            yield
        finally:
            self.video = None

    def is_video(self, pixels: Any) -> bool:
        """Whether these are the pixels of the video that is being encoded.

        Told by the object, so that what an interrupt leaves behind says nothing of other images.
        """
        return self.video is not None and self.video() is pixels

    def forget(self) -> None:
        """Let go of what was noted; what is known of lengths stays."""
        self.notes = {}
