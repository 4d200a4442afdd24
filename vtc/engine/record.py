# SPDX-License-Identifier: Apache-2.0
"""Raw facts of the last forward, as the engines write them; `vtc.report` reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..hooks.per_thread import PerThread, Threaded
from ..reduction import Reduction
from .encoding import History

if TYPE_CHECKING:
    from ..cache.pruned import Slots
    from ..layouts import CropLayout, GridLayout
    from .encoding import VisionState


class Clock:
    """Wall time by name; on a GPU that of the launches unless ``synchronize`` is set."""

    def __init__(self) -> None:
        self.synchronize = False
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.started: dict[str, float] = {}

    def now(self) -> float:
        if torch.compiler.is_compiling():  # no clock inside a graph
            return 0.0
        if self.synchronize and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset(self, *names: str) -> None:
        for name in names:
            self.seconds.pop(name, None)
            self.calls.pop(name, None)

    def start(self, name: str) -> None:
        self.started[name] = self.now()

    def stop(self, name: str) -> None:
        if name in self.started:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - self.started.pop(name)
            self.calls[name] = self.calls.get(name, 0) + 1

    def measure(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if torch.compiler.is_compiling() else self._measure(name)

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def ms(self, name: str) -> float | None:
        return 1e3 * self.seconds[name] if name in self.seconds else None


class Record:
    """Raw facts of the last prefill, as the engines write them; nothing is synchronized here."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.grid: tuple[int, int] | None = None  # patches of the last images encoded
        self.encoded = True  # whether the encoder got through with them
        self.vision: VisionState | None = None  # of the encoder's last forward
        self.images: list[list[int]] = []  # visual tokens of each image of each row
        self.layouts: list[CropLayout] | None = None  # of the last images, where they have crops
        self.grids: list[GridLayout] | None = None  # the same where patches are joined to tokens
        self.videos: list[GridLayout] | None = None  # the same of the last videos
        self.kinds: list[list[str]] = []  # "image" or "video", as images
        self.text = torch.empty(0)  # (B,) other tokens that are not padding
        self.separators: Tensor | None = None  # (B,) newlines between rows of patches, among those
        self.packed: dict[str, Packed] = {}  # by modality, where a model packs images
        self.base = 0  # logical tokens in the cache before the prompt
        self.start: Tokens | None = None  # of the prompt
        self.entered: Tokens | None = None  # what is left of it in front of the LLM
        self.processed: dict[int, Tokens] = {}  # by layer, what it ran on
        self.attended: dict[int, Tokens] = {}  # by layer, what entered its attention
        self.choices: list[Choice] = []
        self.evictions: list[Eviction] = []
        self.slots: list[Slots | None] = []  # of each layer of the KV cache
        self.final: Tokens | None = None
        self.kv: tuple[int, int] = (0, 0)

    def begin(
        self,
        tokens: Tokens,
        real: Tensor,
        images: list[list[int]],
        kinds: list[list[str]],
        separator: Tensor | None,
        base: int,
    ) -> None:
        present = {kind for row in kinds for kind in row}
        if "video" not in present:
            self.videos = None
        if "image" not in present:
            self.layouts = self.grids = None
        self.kinds = kinds
        self.separators = None if separator is None else separator.sum(1)
        self.packed = {kind: p for kind, p in self.packed.items() if kind in present}
        self.images, self.text, self.final = images, (real & ~tokens.visual).sum(1), None
        self.start, self.base, self.entered = tokens, base, None
        self.processed, self.attended = {0: tokens}, {}
        self.choices, self.evictions, self.slots = [], [], []
        self.clock.reset("prefill", "decode")

    def layer(self, i: int, processed: Tokens, attended: Tokens) -> None:
        self.processed[i], self.attended[i] = processed, attended

    def end(self, tokens: Tokens, kv: tuple[int, int], slots: list[Slots | None]) -> None:
        self.final, self.kv, self.slots = tokens, kv, slots


class Records(Threaded):
    """The record of each thread, all of one model.

    Attributes:
        last: of the thread that encoded images last.
        synchronize: as in `Clock`, for all threads.
    """

    own: PerThread[Record] = PerThread(Record)
    last: Record | None = None
    synchronize = False

    @property
    def now(self) -> Record:
        """Of the thread that asks."""
        record = self.own
        record.clock.synchronize = self.synchronize
        return record

    @property
    def shown(self) -> Record:
        """What a report tells: of the thread that asks, or where it ran nothing, the last one."""
        own = self.now
        return own if own.grid is not None or self.last is None else self.last


class Recording:
    """Base of who writes to the record."""

    records: Records

    @property
    def record(self) -> Record:
        """Of this thread."""
        return self.records.now


@dataclass
class Packed:
    """What became of the tokens of several images, as references.

    M tokens entered the features stage.

    Attributes:
        layouts: of the images; history: of the encoder that made the tokens.
        image, order: (M,) as in `FlatTokens`; None if nothing acts on the tokens there.
        reduction: (1, M), None if all are left.
        ranked: for each view of the last method that ranked tokens: which of the M tokens were
            left, which of those (B, n) are in the view, their scores (B, n).
    """

    layouts: list[Any]
    history: History
    image: Tensor | None = None
    order: Tensor | None = None
    reduction: Reduction | None = None
    ranked: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def scores(self) -> Tensor | None:
        """(M,) what the tokens were ranked by, NaN where one was gone; None if nothing."""
        if self.image is None or not self.ranked:
            return None
        out = torch.full(self.image.shape, torch.nan, device=self.image.device)
        for keep, index, values in self.ranked:
            out[keep[index]] = values.float()
        return out


class Tokens(NamedTuple):
    """A batch of sequences: which tokens are visual, of which image of their row, and their places
    in that image; all (B, T)."""

    visual: Tensor
    image: Tensor
    position: Tensor


class Choice(NamedTuple):
    """A reduction of the N visual tokens of each row in front of an LLM layer.

    Attributes:
        image, position: (B, N) as in `Tokens`; valid: (B, N) bool, None if rows agree.
        bypass: whether the tokens that are left out come back behind the layer.
    """

    layer: int
    image: Tensor
    position: Tensor
    valid: Tensor | None
    reduction: Reduction
    bypass: bool = False


class Eviction(NamedTuple):
    """What the P slots of an LLM layer's KV cache, of logical columns (B, P), were ranked by."""

    layer: int
    columns: Tensor
    scores: Tensor
