# SPDX-License-Identifier: Apache-2.0
"""Data sets of the Hugging Face hub by name; docs/data.md lists them.

Repositories, splits, prompts and columns are those of lmms-eval 0.7.3, so that figures compare.
`datasets` finds and downloads the Parquet files of a repository; no code of it is run. A local copy
is read by the same code from the same files: FOLDER/{split}-*.parquet or
FOLDER/data/{split}-*.parquet, in a subfolder named like the configuration where there are several.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from pathlib import Path

from PIL import Image

from ..metrics.scores import RECALL
from .images import Encoded
from .items import Questions
from .parquet import ParquetTable
from .rows import DataRow, check_rows, sample, text_of

FOLDER = "VTC_DATA"
"""Environment variable: a folder with local copies, each in a subfolder of the task's name."""
SPREAD = 8
"""Row groups, of a hundred rows or so, that a sample is drawn from."""
SHORT = "\nAnswer the question using a single word or phrase."
WORD = "\nAnswer the question with a single word."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def _question(row: DataRow) -> str:
    return text_of(row, "question")


def _capitalized(row: DataRow) -> str:
    return text_of(row, "question").capitalize()


def _options(row: DataRow) -> str:
    """ScienceQA: the hint, the question and the options, one a line."""
    context = f"Context: {row['hint']}\n" if row.get("hint") else ""
    options = "\n".join(f"{_letter(i)}. {text}" for i, text in enumerate(row["choices"]))
    return f"{context}{text_of(row, 'question')}\n{options}"


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _describe(row: DataRow) -> str:
    return "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, and the roles of its columns.

    Attributes:
        repo, config, split: of the hub.
        metric: its name; `scores.RECALL` for images with captions.
        answer: column of one answer, of a list of them, or of the index of the right option.
        question: makes the question of a row; suffix: put behind it.
        ids: columns that make an id together; image_ids: columns that tell images apart, where
            there are any; kind: column to break figures down by. One that a copy lacks is done
            without.
        images: configuration that has the images in a table of their own, by `id`.
    """

    repo: str
    split: str
    metric: str
    answer: str = "answer"
    question: Callable[[DataRow], str] = _question
    suffix: str = SHORT
    config: str | None = None
    ids: tuple[str, ...] = ()
    image_ids: tuple[str, ...] = ()
    kind: str | None = None
    images: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that questions are made of."""
        made = ("question", "hint", "choices", self.answer, *self.ids, *self.image_ids)
        return tuple(dict.fromkeys(made if self.kind is None else (*made, self.kind)))


SETS: dict[str, HubSet] = {
    "gqa": HubSet(
        "lmms-lab-encoder/GQA",
        "testdev",
        "exact-match",
        config="testdev_balanced_instructions",
        images="testdev_balanced_images",
        ids=("id",),
        image_ids=("imageId",),
    ),
    "textvqa": HubSet(
        "lmms-lab-encoder/textvqa",
        "validation",
        "vqa-evalai",
        answer="answers",
        question=_capitalized,
        ids=("question_id",),
        image_ids=("image_id",),
    ),
    "pope": HubSet(
        "lmms-lab-encoder/POPE",
        "test",
        "pope",
        ids=("category", "question_id"),
        image_ids=("image_source",),
        kind="category",
    ),
    "docvqa": HubSet(
        "lmms-lab-encoder/DocVQA",
        "validation",
        "anls",
        answer="answers",
        config="DocVQA",
        ids=("questionId",),
        image_ids=("ucsf_document_id", "ucsf_document_page_no"),
    ),
    "chartqa": HubSet("lmms-lab-encoder/ChartQA", "test", "relaxed", suffix=WORD, kind="type"),
    "scienceqa": HubSet(
        "lmms-lab-encoder/ScienceQA",
        "test",
        "choice",
        question=_options,
        suffix=LETTER,
        config="ScienceQA-IMG",
        kind="subject",
    ),
    "flickr30k": HubSet(
        "lmms-lab-encoder/flickr30k",
        "test",
        RECALL,
        answer="caption",
        question=_describe,
        suffix="",
        ids=("img_id",),
        image_ids=("img_id",),
    ),
    "coco": HubSet(
        "lmms-lab-encoder/COCO-Caption2017",
        "val",
        RECALL,
        question=_describe,
        suffix="",
        ids=("question_id",),
        image_ids=("question_id",),
    ),
}


def open_set(
    name: str,
    n: int | None = None,
    seed: int = 0,
    metric: str | None = None,
    split: str | None = None,
    suffix: str | None = None,
    data_dir: str | Path | None = None,
) -> Questions:
    """Open a data set of `SETS`.

    Args:
        n: as many questions, drawn with `seed`; None for all. All downloads the files and keeps
            them in the cache of `datasets`. A sample puts nothing on disk: it draws `SPREAD` row
            groups evenly from all files, or as many as have 2 n rows, and the questions from these.
            A group's images are read when one of them is wanted, and those asked about stay in
            memory. GQA's questions are few bytes, so all are drawn from, and its images are
            downloaded. A local copy gives the same sample.
        metric, split, suffix: in place of the set's own.
        data_dir: a local copy; without it, $VTC_DATA/NAME if there is such a folder.

    Raises:
        ValueError: it cannot be fetched or is not in the copy, or no row of it can be asked.
        ImportError: `datasets` or pyarrow is not installed.
    """
    known = SETS[name]
    split, copy = split or known.split, _copy(name, data_dir)
    few = n is not None and known.images is None
    places: dict[str, int] = {}
    with _explained(name, copy):
        table = ParquetTable(_files(known.repo, known.config, split, copy, download=not few))
        images = table
        if known.images is not None:
            images = ParquetTable(_files(known.repo, known.images, split, copy, download=True))
            ids = images.rows(["id"])
            places = {row["id"]: place for place, row in ids if isinstance(row, dict)}
        groups = _groups(table, n, seed, name) if n is not None and few else None
        rows = list(table.rows([c for c in known.columns if c in table.schema.names], groups))

    label = f"{name}/{split}"
    read = cache(images.image) if few else images.image  # fetched once, however often it is asked
    encoded = Encoded(f"{known.images}/{split}" if places else label, read)

    def find_image(number: int, row: DataRow) -> tuple[Hashable, Callable[[], Image.Image]]:
        key = row["image_id"]
        if places and key not in places:
            raise ValueError(f"there is no image {key!r}")
        return key or number, partial(encoded.load, places.get(key, number))

    captions = known.metric == RECALL and metric is None
    scored = None if captions else metric or known.metric
    asked = _asked(rows, known, known.suffix if suffix is None else suffix)
    entries, found, problems = check_rows(label, asked, find_image, scored)
    entries = sample(entries, n, seed, name)
    return Questions(name, entries, RECALL if captions else found, seed, problems, encoded.key)


def _groups(table: ParquetTable, n: int, seed: int, name: str) -> list[int]:
    """Row groups to draw n rows from: `SPREAD` of them, and 2 n rows or more."""
    order = list(range(len(table.groups)))
    random.Random(f"{name}/{seed}/groups").shuffle(order)
    sizes = accumulate(table.size(group) for group in order)
    enough = next((i for i, size in enumerate(sizes, 1) if i >= SPREAD and size >= 2 * n), None)
    return sorted(order[:enough])


def _copy(name: str, data_dir: str | Path | None) -> Path | None:
    """The folder of the local copy, None for the hub."""
    if data_dir is None:
        copy = Path(os.environ[FOLDER]).expanduser() / name if os.environ.get(FOLDER) else None
        return copy if copy and copy.is_dir() else None
    copy = Path(data_dir).expanduser()
    if not copy.is_dir():
        raise ValueError(f"{copy}: no such folder with a copy of {name}")
    return copy


def _files(
    repo: str, config: str | None, split: str, copy: Path | None, download: bool
) -> list[str]:
    """The Parquet files of a split: paths, or URLs if they are not to be downloaded."""
    if copy is not None:
        base = copy / config if config and (copy / config).is_dir() else copy
        found = [
            str(f) for d in (base, base / "data") for f in sorted(d.glob(f"{split}-*.parquet"))
        ]
        if not found:
            raise ValueError(f"there is no {split}-*.parquet in {base} or {base / 'data'}")
        return found
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'data sets of the hub need: pip install "visual-token-compression[data]"'
        ) from error
    splits = datasets.load_dataset_builder(repo, config).config.data_files
    if split not in splits:
        raise ValueError(f"there is no split {split!r}, only {', '.join(map(str, splits))}")
    urls = [str(url) for url in splits[split]]
    return datasets.DownloadManager().download(urls) if download else urls


@contextmanager
def _explained(name: str, copy: Path | None) -> Iterator[None]:
    """Turn what `datasets` and `fsspec` raise, of many kinds, into a ValueError that helps."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if copy is not None:
            raise ValueError(f"{copy}: cannot be read as a copy of {name}: {reason}") from error
        raise ValueError(
            f"{name} cannot be read from the hub: {reason}. Without network, give the folder of a "
            f"local copy as data_dir, or put it into ${FOLDER} as {name}; this makes one: "
            f"hf download {SETS[name].repo} --repo-type dataset --local-dir {name}"
        ) from error


def _asked(
    rows: Iterable[tuple[int, DataRow | ValueError]], known: HubSet, suffix: str
) -> Iterator[tuple[int, DataRow | ValueError]]:
    """The rows with the fields that files of one's own have, and `image_id`."""
    seen: Counter[str] = Counter()
    for number, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            answer = row[known.answer]
            if isinstance(answer, int):
                answer = _letter(answer)
            question = known.question(row) + suffix
        except (KeyError, TypeError, ValueError) as error:
            yield number, ValueError(f"not as {known.repo} has it: {error}")
            continue
        name = _joined(row, known.ids) or _digest(f"{question}\n{answer}")
        seen[name] += 1
        yield (
            number,
            {
                "question": question,
                "answers" if isinstance(answer, list) else "answer": answer,
                "id": name if seen[name] == 1 else f"{name}#{seen[name]}",
                "kind": row.get(known.kind) if known.kind else None,
                "image_id": _joined(row, known.image_ids),
            },
        )


def _joined(row: DataRow, columns: Iterable[str]) -> str | None:
    return "-".join(str(row[c]) for c in columns if row.get(c) is not None) or None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
