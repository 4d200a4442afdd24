# SPDX-License-Identifier: Apache-2.0
"""Text-to-image retrieval over a few scenes, with and without compression of the image encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from ..benchmarks.tasks import scenes
from ..method import Chain
from ..session import compressing, observe
from .choices import ENCODER_STAGES, make, usable
from .results import BASELINE, COMPRESSED
from .worker import Say, Worker

SIZE = 12
"""Scenes of the gallery."""
REMEMBERED = 32
"""Settings whose embeddings of the gallery are remembered; nothing of a user is among them."""


@dataclass(frozen=True)
class Ranking:
    """The gallery by similarity to a text, best first, and what its embedding took.

    Attributes:
        hits: scenes that come first for their own caption.
        tokens: patch tokens behind the encoder.
    """

    order: list[int]
    scores: list[float]
    hits: int
    tokens: float
    ms_per_image: float


@dataclass(frozen=True)
class _Embedded:
    """Embeddings (images, D) and what they took."""

    vectors: torch.Tensor
    tokens: float
    ms_per_image: float


class Gallery:
    """Scenes of the test split, which the embedded models never saw, and the model to find them."""

    def __init__(self, worker: Worker, size: int = SIZE) -> None:
        drawn = [scenes.make_scene(i, seed=7) for i in range(size)]
        self.captions = [scenes.caption(scene) for scene in drawn]
        self.images: list[Image.Image] = [scenes.render(scene) for scene in drawn]
        self._worker = worker
        self._known: dict[str, _Embedded] = {}

    @cached_property
    def tower(self) -> Any:
        """The embedded retrieval model."""
        from ..benchmarks.encoders import towers

        return towers.load()

    @cached_property
    def methods(self) -> list[str]:
        """The methods that work on its image encoder."""
        return list(usable(self.tower.vision, ENCODER_STAGES))

    def search(
        self, text: str, names: Sequence[str], keep: float
    ) -> Iterator[tuple[str, dict[str, Ranking]]]:
        """(status, rankings so far) of the gallery for a text, without and with compression.

        Raises:
            ValueError: no text, or methods that do not work on an encoder alone.
        """
        if not text.strip():
            raise ValueError("describe a scene first")
        method = make(names, keep)

        def work(say: Say[tuple[str, dict[str, Ranking]]]) -> None:
            found: dict[str, Ranking] = {}
            own = self.tower.encode_texts(self.captions)
            asked = self.tower.encode_texts([text])[0]
            for name, chosen in ((BASELINE, None), (COMPRESSED, method)):

                def tick(done: int, name: str = name) -> None:
                    say((f"{name}, image {done + 1} of {len(self.images)}", dict(found)))

                seen = self._embed(chosen, tick)
                near = (seen.vectors @ asked).tolist()
                order = sorted(range(len(near)), key=lambda i: -near[i])
                first = (own @ seen.vectors.T).argmax(1).tolist()
                found[name] = Ranking(
                    order,
                    [near[i] for i in order],
                    sum(i == best for i, best in enumerate(first)),
                    seen.tokens,
                    seen.ms_per_image,
                )
            say(("done", found))

        return self._worker.run(work)

    def _embed(self, method: Chain | None, tick: Callable[[int], None]) -> _Embedded:
        """The gallery's embeddings, remembered by the method's parameters."""
        key = str(method)
        if key not in self._known:
            vision = self.tower.vision
            with observe(vision) if method is None else compressing(vision, method) as session:
                rows, times = [], []
                for i, image in enumerate(self.images):
                    tick(i)
                    pixels = self.tower.pixels([image])
                    start = time.perf_counter()
                    rows.append(self.tower.encode(pixels))
                    times.append(1e3 * (time.perf_counter() - start))
                tokens = session.report().final_tokens
            while len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = _Embedded(torch.cat(rows), tokens, sorted(times)[len(times) // 2])
        return self._known[key]
