# SPDX-License-Identifier: Apache-2.0
"""Questions about images: items, and deterministic sequences of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import overload

from PIL import Image

from ..metrics.scores import one_word

__all__ = ["BadItem", "Entry", "Item", "score"]


class BadItem(ValueError):
    """A row or an image that cannot be read; the text says where and why."""


@dataclass(frozen=True)
class Item:
    """One question about one image.

    `answers` holds all references, `answer` the first of them; `id` is unique in its task.
    """

    image: Image.Image
    question: str
    answer: str
    kind: str
    answers: tuple[str, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        if not self.answers:
            object.__setattr__(self, "answers", (self.answer,))


@dataclass(frozen=True)
class Entry:
    """An item whose image is made on demand; entries with equal `image_id` share it.

    `load` raises `BadItem` if it cannot. Without an `id`, the image's and a number make one.
    """

    image_id: Hashable
    load: Callable[[], Image.Image]
    question: str
    answer: str
    kind: str
    answers: tuple[str, ...] = ()
    id: str = ""


def score(prediction: str, answer: str) -> bool:
    """Return whether the metric "one-word" takes the prediction for the answer."""
    return bool(one_word(prediction, (answer,)))


class Questions(Sequence[Item]):
    """A deterministic sequence of items, their images made on demand.

    Taking one whose image cannot be read raises `BadItem`, which ends a loop over all: to go on,
    take them by index.

    Attributes:
        name: of the task. metric: name of its metric in `scores.METRICS`.
        problems: (where, why) of rows that were refused on loading.
        fingerprint: equal for equal questions, answers, ids, order and seed.
    """

    def __init__(
        self,
        name: str,
        entries: Sequence[Entry],
        metric: str,
        seed: int = 0,
        problems: Sequence[tuple[str, str]] = (),
        key_of: Callable[[Hashable], Hashable] = lambda image_id: image_id,
    ):
        self.name, self.metric, self.problems = name, metric, list(problems)
        self.entries = _with_ids(entries)
        self._key_of = key_of
        asked = [[e.id, e.question, e.answers or (e.answer,)] for e in self.entries]
        text = json.dumps([name, seed, asked], ensure_ascii=True)
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._last: tuple[Hashable, Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry = self.entries[index]
        if self._last is None or self._last[0] != entry.image_id:
            self._last = (entry.image_id, entry.load())
        image = self._last[1]
        return Item(image, entry.question, entry.answer, entry.kind, entry.answers, entry.id)

    def image_keys(self) -> list[Hashable]:
        """A key for the image of each item, equal for one image; none is decoded."""
        return [self._key_of(e.image_id) for e in self.entries]


def _with_ids(entries: Sequence[Entry]) -> list[Entry]:
    """Entries that all have an id: that of the image and, counting from 0, of the question."""
    count: Counter[Hashable] = Counter()
    result = []
    for entry in entries:
        number, count[entry.image_id] = count[entry.image_id], count[entry.image_id] + 1
        result.append(entry if entry.id else replace(entry, id=f"{entry.image_id}-{number}"))
    return result
