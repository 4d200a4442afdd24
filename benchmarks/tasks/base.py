# SPDX-License-Identifier: Apache-2.0
"""What every task yields: items with an image, a question and a one-word answer."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}


@dataclass(frozen=True)
class Item:
    """One question about one image."""

    image: Image.Image
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Entry:
    """An item whose image is made on demand; entries with equal `image_id` share it."""

    image_id: int
    load: Callable[[], Image.Image]
    question: str
    answer: str
    kind: str


def normalize(text: str) -> str:
    """Return `text` in lower case without punctuation or articles, number words as digits."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return " ".join(NUMBER_WORDS.get(w, w) for w in words if w not in ("a", "an", "the"))


def score(prediction: str, answer: str) -> bool:
    """Return whether the normalised prediction equals the normalised answer."""
    return normalize(prediction) == normalize(answer)


# name -> module with `entries(split, n, seed, **options)`, options
TASKS: dict[str, tuple[str, dict]] = {
    "easy-vqa": ("easy_vqa", {}),
    "scenes": ("scenes", {"level": "default"}),
    "scenes-hard": ("scenes", {"level": "hard"}),
    "small-text": ("small_text", {}),
}


class Task(Sequence[Item]):
    """A deterministic sequence of `n` items (all of them if None) of a registered task."""

    def __init__(self, name: str, split: str = "test", n: int | None = 500, seed: int = 0):
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; one of {', '.join(TASKS)}")
        module_name, options = TASKS[name]
        module = importlib.import_module(f"{__package__}.{module_name}")
        self.name, self.split = name, split
        self.entries: list[Entry] = module.entries(split, n, seed, **options)
        self._last: tuple[int, Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry = self.entries[index]
        if self._last is None or self._last[0] != entry.image_id:
            self._last = (entry.image_id, entry.load())
        return Item(self._last[1], entry.question, entry.answer, entry.kind)
