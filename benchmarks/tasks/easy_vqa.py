# SPDX-License-Identifier: Apache-2.0
"""The easy-VQA data set (PyPI package ``easy-vqa``): one shape per 64 x 64 image, 13 answers."""

from __future__ import annotations

import random
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import ModuleType

from PIL import Image

from .items import Entry

SHAPES = ("circle", "rectangle", "triangle")
QUESTIONS_PER_IMAGE = 5


def _package() -> ModuleType:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("the task 'easy-vqa' needs: pip install easy-vqa") from error
    return easy_vqa


def load_split(split: str) -> tuple[dict[int, Path], dict[int, list[tuple[str, str]]]]:
    """Return image paths by id and [(question, answer), ...] by image id of "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has the splits 'train' and 'test', not {split!r}")
    package = _package()
    if split == "train":
        paths, questions = package.get_train_image_paths(), package.get_train_questions()
    else:
        paths, questions = package.get_test_image_paths(), package.get_test_questions()
    grouped = defaultdict(list)
    for question, answer, image_id in zip(*questions, strict=True):
        grouped[image_id].append((question, answer))
    return {i: Path(paths[i]) for i in sorted(grouped)}, dict(grouped)


def _load(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "exist"
    return "shape" if answer in SHAPES else "color"


def entries(split: str, n: int | None, seed: int) -> list[Entry]:
    """Return `n` questions, at most five per image, of shuffled images; all in order if n is
    None."""
    paths, grouped = load_split(split)
    ids = list(paths)
    rng = random.Random(f"easy-vqa/{split}/{seed}")
    if n is not None:
        rng.shuffle(ids)
    result = []
    for image_id in ids:
        pairs = grouped[image_id]
        if n is not None:
            pairs = rng.sample(pairs, min(QUESTIONS_PER_IMAGE, len(pairs)))
        load = partial(_load, paths[image_id])
        result += [Entry(image_id, load, q, a, _kind(a)) for q, a in pairs]
        if n is not None and len(result) >= n:
            return result[:n]
    if n is not None:
        raise ValueError(f"easy-VQA {split} has only {len(result)} such questions, {n} asked for")
    return result
