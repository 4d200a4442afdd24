# SPDX-License-Identifier: Apache-2.0
"""The questions of a task in batches of fixed composition, read from it a batch at a time."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
import zlib
from collections.abc import Collection, Sequence
from typing import Any

from PIL import Image

from ..metrics.scores import Metric
from ..shared.prompts import Batch, arrange, image_key, make_batch
from ..tasks.items import BadItem, Questions

BAD = (
    ValueError,  # BadItem, an image of a shape that the processor refuses, too few references
    OSError,
    EOFError,
    SyntaxError,  # Pillow, of a broken PNG
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    struct.error,
    zlib.error,
)
"""Errors that reading a broken row or image ends in."""


class Samples:
    """Batches of a task; which questions are in which batch depends on nothing else.

    Attributes:
        batches: positions of the questions of each batch; those about one image lie together.
        keys: of the image of each question.
        fingerprint: that of the task, or a digest of the images, questions and answers.
    """

    def __init__(self, processor: Any, items: Sequence[Any], size: int, metric: Metric) -> None:
        self.processor, self.items, self.metric = processor, items, metric
        if isinstance(items, Questions):  # no image is decoded
            self.keys, self.fingerprint = [str(k) for k in items.image_keys()], items.fingerprint
        else:
            self.keys, self.fingerprint = self._digest()
        self.batches = arrange(self.keys, size)

    def _digest(self) -> tuple[list[str], str]:
        """Keys and fingerprint of a plain sequence, holding one image at a time."""
        keys, digest = [], hashlib.blake2b(digest_size=16)
        for i in range(len(self.items)):
            try:
                item = self._read(i)
                keys.append(image_key(item.image))
                facts = [keys[-1], item.question, item.answers]
            except BAD:  # reported when its turn comes
                keys.append(f"unreadable {i}")
                facts = [keys[-1]]
            digest.update(json.dumps(facts).encode())
        return keys, digest.hexdigest()

    def _read(self, index: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            item = self.items[index]
        self.metric.score("", item.answers)  # a row may have too few answers for the metric
        return item

    def _batch(self, items: dict[int, Any]) -> Batch:
        keys = [self.keys[i] for i in items]
        return make_batch(self.processor, list(items.values()), keys, list(items))

    def load(
        self, number: int, without: Collection[int] = ()
    ) -> tuple[Batch | None, list[dict[str, Any]]]:
        """Batch ``number``, None if nothing is left of it; and what could not be read, and why.

        Args:
            without: positions of questions that are left out.
        """
        found: dict[int, Any] = {}
        bad: list[dict[str, Any]] = []
        for i in self.batches[number]:
            if i not in without:
                try:
                    found[i] = self._read(i)
                except BAD as error:
                    bad.append(_skipped(i, error))
        try:
            return self._batch(found) if found else None, bad
        except BAD:  # Pillow decodes late, and processors are choosy: which one is it?
            for i in list(found):
                try:
                    self._batch({i: found[i]})
                except BAD as error:
                    bad.append(_skipped(i, error))
                    del found[i]
            return self._batch(found) if found else None, bad

    def first(self) -> Batch:
        """The first question that can be read, alone.

        Raises:
            BadItem: there is none; with the first reason.
        """
        bad: list[dict[str, Any]] = []
        for chosen in self.batches:
            for i in chosen:
                try:
                    return self._batch({i: self._read(i)})
                except BAD as error:
                    bad.append(_skipped(i, error))
        raise BadItem(
            f"none of the {len(bad)} questions can be asked; "
            f"the first: {bad[0]['where']}: {bad[0]['why']}"
        )


def _skipped(index: int, error: BaseException) -> dict[str, Any]:
    if isinstance(error, BadItem):
        where, _, why = str(error).partition(": ")
    else:
        where, why = f"question {index}", f"{type(error).__name__}: {error}"
    return {"index": index, "where": where, "why": why}
