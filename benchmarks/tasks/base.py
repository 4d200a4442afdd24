# SPDX-License-Identifier: Apache-2.0
"""What every task yields: items with an image, a question and its reference answers."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from PIL import Image

from ..metrics import metric as find_metric
from ..metrics import normalize, one_word

__all__ = ["TASKS", "BadItem", "Entry", "Item", "Task", "normalize", "open_task", "score"]


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
        name: of the task. metric: name of its metric in `metrics.METRICS`.
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


# name -> module with `entries(split, n, seed, **options)`, options
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "easy-vqa": ("easy_vqa", {}),
    "scenes": ("scenes", {"level": "default"}),
    "scenes-hard": ("scenes", {"level": "hard"}),
    "small-text": ("small_text", {}),
}


class Task(Questions):
    """`n` items (all of them if None) of a task of this package."""

    def __init__(self, name: str, split: str = "test", n: int | None = 500, seed: int = 0):
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}; one of {', '.join(TASKS)}")
        module_name, options = TASKS[name]
        module = importlib.import_module(f"{__package__}.{module_name}")
        self.split = split
        super().__init__(name, module.entries(split, n, seed, **options), "one-word", seed)


def open_task(
    spec: str | Path,
    n: int | None = None,
    seed: int = 0,
    *,
    metric: str | None = None,
    split: str | None = None,
    suffix: str | None = None,
    data_dir: str | Path | None = None,
) -> Questions:
    """Open a task by its name, a data set of the hub by its name, or your own data by its path.

    Args:
        spec: a name of `TASKS` or of `hub.SETS`, or the path of a .jsonl or .parquet file or of an
            image folder. A name wins over a path; write ./scenes for a folder called so.
        n: as many questions, drawn with `seed`; None for all (500 of a rendered task). Of files
            and hub sets, all if there are no more.
        metric: a name of `metrics.METRICS` in place of the task's.
        split: of a named task; its own if None.
        suffix: what is put behind the questions of a hub set, in place of its own.
        data_dir: a local copy of a hub set, laid out as the hub has it.

    Raises:
        ValueError: nothing of this name, nothing that can be asked, an option that does not apply.
    """
    from . import files, hub

    name, path = str(spec), Path(spec).expanduser()
    if metric is not None:
        find_metric(metric)
    unused = {"suffix": suffix, "data_dir": data_dir}
    if name in hub.SETS:
        return hub.open_set(name, n, seed, metric, split, suffix, data_dir)
    if name in TASKS:
        task: Questions = Task(name, split or "test", n, seed)
        task.metric = metric or task.metric
    elif path.suffix in files.FORMATS or path.is_dir():
        task = files.open_path(path, n, seed, metric)
        unused["split"] = split
    else:
        raise ValueError(
            f"unknown task {name!r}: neither a name ({', '.join([*TASKS, *hub.SETS])}) nor a "
            f"{', '.join(files.FORMATS)} file or an image folder"
        )
    if given := [option for option, value in unused.items() if value is not None]:
        raise ValueError(f"{name} takes no {' and no '.join(given)}: that is for hub data sets")
    return task
