# SPDX-License-Identifier: Apache-2.0
"""One batch of questions after the other, put to the stock model and to every configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import UnsupportedError
from ...method import Method
from ...session import compressing
from ..shared.names import BASELINE
from ..shared.prompts import Batch
from .answering import Answers, answer, divergences
from .batches import Samples
from .distributed import World
from .encoder_cache import EncoderCache, leaves_encoder_alone
from .journal import Journal, Line
from .rows import AccuracyRow, fill_scores

BLANK = "blank image"


@dataclass(frozen=True)
class Configuration:
    """Stock model, stock model without seeing, or a method at a budget: one that answers."""

    row: AccuracyRow
    method: Method | None = None

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return self.row.parameters or self.row.method

    @property
    def label(self) -> str:
        """Its name for people."""
        tokens = self.row.asked_tokens
        return self.row.method if tokens is None else f"{self.row.method}, {tokens}"


class Exam:
    """All batches, all configurations; what the journal has already is not asked again.

    Args:
        configurations: the stock model first, which answers first and all are compared with, and
            its blank images second. Those whose row has an error are passed over.
    """

    def __init__(
        self,
        model: Any,
        samples: Samples,
        configurations: Sequence[Configuration],
        max_new_tokens: int,
        journal: Journal,
        world: World,
    ) -> None:
        self.model, self.samples, self.journal, self.world = model, samples, journal, world
        self.configurations, self.max_new_tokens = configurations, max_new_tokens
        self.steps = len(configurations) * len(samples.batches)
        self.encoder = EncoderCache.of(
            model, [c.method for c in configurations if c.method is not None]
        )
        self.batch: Batch | None = None
        self.stock: Answers | None = None

    def pending(self, number: int, configuration: Configuration) -> bool:
        """Whether a configuration has still to answer a batch.

        The stock model has to as long as any other has, which is compared with it.
        """
        if configuration.row.error is not None:
            return False
        known = self.journal.answers.get(configuration.key, {})
        chosen = self.samples.batches[number]
        if any(i not in known and i not in self.journal.skipped for i in chosen):
            return True
        others = self.configurations[1:] if configuration.key == BASELINE else ()
        return any(self.pending(number, other) for other in others)

    def ask_pending(self, progress: Callable[[str, int], None]) -> None:
        """Ask everything that is pending; each process takes its turn at the batches.

        Args:
            progress: called with what runs and the steps that are done, of `steps`.
        """
        total, done = len(self.samples.batches), 0
        for start in range(0, total, self.world.size):
            turn = range(start, min(start + self.world.size, total))
            mine = start + self.world.rank
            for configuration in self.configurations:
                if any(self.pending(number, configuration) for number in turn):
                    progress(configuration.label, done)
                    self._together(configuration, mine if mine in turn else None)
                done += len(turn)
        self.batch = self.stock = None

    def _together(self, configuration: Configuration, mine: int | None) -> None:
        """One configuration in all processes, each with its batch."""

        def accept(outcome: tuple[list[Line], str | None]) -> None:
            lines, error = outcome
            self.journal.add(lines)
            configuration.row.error = configuration.row.error or error

        self.world.together(lambda: self._ask(configuration, mine), accept)

    def _ask(self, asked: Configuration, number: int | None) -> tuple[list[Line], str | None]:
        """Lines for the journal, or why this configuration cannot run."""
        lines: list[Line] = []
        if number is None or not self.pending(number, asked):
            return lines, None
        if asked.key == BASELINE:
            self.batch = self.stock = None  # the last one goes before the next one comes
            self.batch, lines = self.samples.load(number, self.journal.skipped)
        if self.batch is None:
            return lines, None
        try:
            answers = self._answers(asked, self.batch, number)
        except UnsupportedError as error:
            return lines, str(error)
        if asked.key == BASELINE:
            self.stock = answers
        return lines + self._lines(asked.key, self.batch, answers), None

    def _answers(self, configuration: Configuration, batch: Batch, number: int) -> Answers:
        blank, method = configuration.key == BLANK, configuration.method
        with ExitStack() as stack:
            if method is not None:
                stack.enter_context(compressing(self.model, method))
            shares = not blank and (method is None or leaves_encoder_alone(method))
            if self.encoder is not None and shares:
                stack.enter_context(self.encoder.remembered(number))
            return answer(
                self.model,
                self.samples.processor,
                blanked(batch) if blank else batch,
                self.max_new_tokens,
                logits=not blank,
            )

    def _lines(self, key: str, batch: Batch, answers: Answers) -> list[Line]:
        """A line for each answer; those of the stock model say what was asked."""
        stock = self.stock or answers
        kl: list[float | None] = [None] * len(answers.texts)
        if answers.logits:
            found = divergences(self.model, stock, answers)
            kl = [x if math.isfinite(x) else None for x in found]
        return [
            {
                "configuration": key,
                "index": index,
                "id": item.id or str(index),
                "prediction": text,
                "score": float(self.samples.metric.score(text, item.answers)),
                "kl": kl[row],
                "same": text == stock.texts[row],
                **(self._facts(index, item) if key == BASELINE else {}),
            }
            for row, (index, item, text) in enumerate(
                zip(batch.indices, batch.items, answers.texts)
            )
        ]

    def _facts(self, index: int, item: Any) -> Line:
        return {
            "question": item.question,
            "answers": list(item.answers),
            "kind": str(item.kind),
            "image": self.samples.keys[index],
        }

    def score(self, seed: int) -> list[Line]:
        """Fill in the rows from the batches that all configurations have answered.

        Returns:
            The lines of the stock model for these batches.
        """
        order = [
            i
            for number, chosen in enumerate(self.samples.batches)
            if not self.pending(number, self.configurations[0])
            for i in chosen
            if i not in self.journal.skipped
        ]
        asked = [self.journal.answers[BASELINE][i] for i in order]
        for c in self.configurations:
            if asked and c.row.error is None:
                answers = [self.journal.answers[c.key][i] for i in order]
                fill_scores(c.row, answers, asked, self.samples.metric, seed)
        stock, blank = self.configurations[0].row, self.configurations[1].row
        stock.blank_accuracy = blank.accuracy
        return asked

    def skipped(self) -> list[Line]:
        """Questions that could not be asked, in the order of the batches."""
        known = self.journal.skipped
        return [known[i] for chosen in self.samples.batches for i in chosen if i in known]

    def lines(self) -> Iterator[Line]:
        """The journal in an order that does not depend on who answered when.

        Without configurations that turned out not to run, which may have answered some questions.
        """
        for chosen in self.samples.batches:
            yield from (self.journal.skipped[i] for i in chosen if i in self.journal.skipped)
            for c in self.configurations:
                if c.row.error is None:
                    known = self.journal.answers.get(c.key, {})
                    yield from (known[i] for i in chosen if i in known)


def blanked(batch: Batch) -> Batch:
    """The same questions about images of the processor's mean colour, of the same sizes."""
    pixels = torch.zeros_like(batch.vision["pixel_values"])
    return replace(batch, vision={**batch.vision, "pixel_values": pixels})
