# SPDX-License-Identifier: Apache-2.0
"""Training data: a pool of rendered scenes in shared memory, and easy-VQA as arrays."""

from __future__ import annotations

import mmap
import multiprocessing as mp
import random

import numpy as np
from PIL import Image

from ..tasks import easy_vqa, scenes
from .models import EOS, make_tokenizer

PAIRS = 16  # question-answer pairs stored per image
LENGTH = 20  # tokens of a pair, answer and </s> included
CAPTION = 96


def shared(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return a zeroed array in memory that forked processes share."""
    count = int(np.prod(shape))
    memory = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(memory, dtype, count).reshape(shape)


class PairTokenizer:
    """Turns questions and answers into fixed-length token rows."""

    def __init__(self):
        self.tokenizer, self.captions = make_tokenizer(), make_tokenizer(end=True)
        self.unk = self.tokenizer.unk_token_id

    def pair(self, question: str, answer: str) -> tuple[list[int], int]:
        """Return the tokens of "question assistant: answer </s>" and where the answer stands."""
        ask = self.tokenizer(f"{question} ASSISTANT:", add_special_tokens=False).input_ids
        reply = self.tokenizer(answer, add_special_tokens=False).input_ids
        if self.unk in ask + reply or len(reply) != 1 or len(ask) + 2 > LENGTH:
            raise ValueError(f"pair does not fit the vocabulary or length: {question!r} {answer!r}")
        return ask + reply + [EOS] + [0] * (LENGTH - len(ask) - 2), len(ask)

    def caption(self, text: str) -> list[int]:
        """Return the tokens of a caption, padded."""
        ids = self.captions(text).input_ids
        if self.unk in ids or len(ids) > CAPTION:
            raise ValueError(f"caption does not fit the vocabulary or length: {text!r}")
        return ids + [0] * (CAPTION - len(ids))


class ScenePool:
    """`size` scenes rendered by forked worker processes while training already uses the first ones.

    Every fifth scene is of level "hard" where `hard` is set. Arrays: images (N, 336, 336, 3)
    uint8, labels (N, 24, 24, 3) int8 with shape (5 = background), colour and digit of each patch
    (-1 = none), tokens (N, PAIRS, LENGTH) int16, starts (N, PAIRS) int8, captions (N, CAPTION)
    int16.
    """

    def __init__(self, size: int, split: str, seed: int, hard: bool, workers: int):
        self.size, self.split, self.seed, self.hard, self.workers = size, split, seed, hard, workers
        self.images = shared((size, scenes.SIDE, scenes.SIDE, 3), np.uint8)
        self.labels = shared((size, scenes.GRID, scenes.GRID, 3), np.int8)
        self.tokens = shared((size, PAIRS, LENGTH), np.int16)
        self.starts = shared((size, PAIRS), np.int8)
        self.captions = shared((size, CAPTION), np.int16)
        self.done = shared((workers,), np.int64)
        context = mp.get_context("fork")
        self.processes = [
            context.Process(target=self._work, args=(w,), daemon=True) for w in range(workers)
        ]
        for process in self.processes:
            process.start()

    def level(self, index: int) -> str:
        """Return the level of scene `index`."""
        return "hard" if self.hard and index % 5 == 4 else "default"

    def filled(self) -> int:
        """Return n such that scenes 0..n-1 are ready."""
        if any(process.exitcode for process in self.processes):
            raise RuntimeError("a rendering process failed")
        return int(min(self.size, self.done.min() * self.workers))

    def close(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.terminate()

    def _work(self, worker: int) -> None:
        encoder = PairTokenizer()
        for index in range(worker, self.size, self.workers):
            self._fill(index, encoder)
            self.done[worker] += 1
        self.done[worker] = self.size  # the last round may be short of one scene

    def _fill(self, index: int, encoder: PairTokenizer) -> None:
        scene = scenes.make_scene(index, self.split, self.seed, self.level(index))
        self.images[index] = np.asarray(scenes.render(scene))
        labels = self.labels[index]
        labels[...] = (len(scenes.SHAPES), -1, -1)
        for obj, share in zip(scene.objects, scenes.coverage(scene), strict=True):
            inside = share >= 0.5
            labels[inside, 0] = scenes.SHAPES.index(obj.shape)
            labels[inside, 1] = list(scenes.COLORS).index(obj.color)
            if obj.digit is not None:
                y, x = np.mgrid[: scenes.GRID, : scenes.GRID] * scenes.PATCH + scenes.PATCH / 2
                near = (abs(y - obj.y) < 0.5 * obj.r) & (abs(x - obj.x) < 0.4 * obj.r)
                labels[near & inside, 2] = obj.digit
        rng = random.Random(scene.key + "/training")
        asked = scenes.ask(scene, PAIRS, rng)
        asked += rng.choices(asked, k=PAIRS - len(asked))
        for slot, (question, answer, _) in enumerate(asked):
            self.tokens[index, slot], self.starts[index, slot] = encoder.pair(question, answer)
        self.captions[index] = encoder.caption(scenes.caption(scene))


def easy_arrays(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images (N, 64, 64, 3), tokens (N, PAIRS, LENGTH) and starts (N, PAIRS) of easy-VQA."""
    paths, grouped = easy_vqa.load_split(split)
    encoder, rng = PairTokenizer(), random.Random(f"easy-vqa/{split}/training")
    cache: dict[tuple[str, str], tuple[list[int], int]] = {}
    images, tokens, starts = [], [], []
    for image_id, path in paths.items():
        images.append(np.asarray(Image.open(path).convert("RGB")))
        pairs = list(grouped[image_id])
        rng.shuffle(pairs)
        pairs = (pairs + rng.choices(pairs, k=PAIRS))[:PAIRS]
        cache.update({p: encoder.pair(*p) for p in pairs if p not in cache})
        rows = [cache[p] for p in pairs]
        tokens.append([row for row, _ in rows])
        starts.append([start for _, start in rows])
    return np.stack(images), np.array(tokens, np.int16), np.array(starts, np.int8)
