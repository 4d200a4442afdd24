# SPDX-License-Identifier: Apache-2.0
"""Computations of the demo, without Gradio.

A request is a generator of snapshots. Nothing of it is kept here: what the caller got is all there
is of it. All models run on one thread, one request after the other (`demos.worker`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from random import sample
from typing import Any

import torch
from PIL import Image

from ..benchmarks.measure.allocations import Allocations, watched
from ..report.overlay import overlay
from ..report.report import Report
from ..session import compressing, observe
from .choices import PageModel, make, usable
from .gallery import Gallery
from .measuring import Open, Times, Watch, generate, race
from .results import BASELINE, COMPRESSED, ComparisonRow, Side, Snapshot
from .worker import Say, Worker

MAX_LENGTH, MAX_ROUNDS, MAX_METHODS = 256, 9, 8
PICTURE = 640
"""Longer side of a picture in pixels."""


def draw(
    report: Report, image: Image.Image, processor: Any, kind: Any = "kept", layer: Any = None
) -> Image.Image:
    """`vtc.overlay` at the size of the page.

    Raises:
        ValueError: this method or step has no such picture; the text says why.
    """
    return overlay(report, image, processor=processor, kind=kind, layer=layer, size=PICTURE)


class Engine:
    """Models, the methods that work on each, a gallery to search, and the thread that runs it all.

    Args:
        models: not wrapped; they are wrapped for the length of a generation only.
    """

    def __init__(self, models: Sequence[PageModel]) -> None:
        self.models = {model.title: model for model in models}
        self.methods = {model.title: usable(model.net) for model in models}
        with watched(torch.device("cpu"), Allocations()):
            pass  # torch's profiler wants to be used in the main thread first
        self._worker = Worker()
        self.gallery = Gallery(self._worker)

    def close(self) -> None:
        """End the thread; what still waits is dropped."""
        self._worker.close()

    def answer(
        self,
        title: str,
        image: Image.Image,
        question: str,
        names: Sequence[str],
        keep: float,
        length: int = 32,
        rounds: int = 3,
    ) -> Iterator[Snapshot]:
        """The answer with and without compression, streamed; then times.

        Both sides first answer once, in random order: that is the streamed text, the tokens and
        bytes, and the warm-up. Then both are timed in ``rounds`` rounds, in random order in each,
        the stock model without any hook.

        Args:
            title: of the model; names: of the methods, a chain where there are several.
            keep: share of the image tokens that is left; length: of the answer in tokens.

        Raises:
            ValueError: a question, method or image that cannot be asked; the text is for the user.
        """
        model, method = self._model(title), make(names, keep)
        _check(length, rounds)
        sessions: dict[str, Open] = {
            BASELINE: lambda: observe(model.net),
            COMPRESSED: lambda: compressing(model.net, method),
        }

        def work(say: Say[Snapshot]) -> None:
            now = Snapshot("reading the image", {BASELINE: Side(), COMPRESSED: Side()})
            say(now)
            inputs = model.inputs(image, question)
            for name in sample(list(sessions), 2):
                now = replace(now, status=f"answering, {name}")

                def tell(side: Side, name: str = name) -> None:
                    nonlocal now
                    now = replace(now, sides={**now.sides, name: side})
                    say(now)

                with sessions[name]() as session:
                    tell(_answer(model, inputs, length, session, tell))
                    if name == COMPRESSED:
                        now = replace(now, report=session.report())

            def begin(text: str) -> None:
                say(replace(now, status=text))

            timed = {**sessions, BASELINE: nullcontext}
            times = _times(model, inputs, timed, length, rounds, begin, say)
            sides = {name: _timed(side, times[name]) for name, side in now.sides.items()}
            say(replace(now, sides=sides, status="done", done=True))

        return self._worker.run(work)

    def compare(
        self,
        title: str,
        image: Image.Image,
        question: str,
        names: Sequence[str],
        keep: float,
        length: int = 16,
        rounds: int = 2,
    ) -> Iterator[tuple[str, list[ComparisonRow]]]:
        """(status, rows so far) of the stock model and several methods on one question.

        A method that cannot do it gets a row that says why. Times as in `answer`.

        Raises:
            ValueError: as `answer`, and more than `MAX_METHODS` methods.
        """
        model = self._model(title)
        methods = {name: make([name], keep) for name in names}
        if not 0 < len(methods) <= MAX_METHODS:
            raise ValueError(f"choose between 1 and {MAX_METHODS} methods")
        _check(length, rounds)

        def session_of(name: str) -> Any:
            if name == BASELINE:
                return observe(model.net)
            return compressing(model.net, methods[name])

        def work(say: Say[tuple[str, list[ComparisonRow]]]) -> None:
            rows: list[ComparisonRow] = []

            def begin(text: str) -> None:
                say((text, list(rows)))

            begin("reading the image")
            inputs = model.inputs(image, question)
            for name in [BASELINE, *methods]:
                begin(f"answering, {name}")
                try:
                    with session_of(name) as session:
                        side = _answer(model, inputs, length, session, lambda side: say(None))
                        report = session.report()
                        merges = any(method.merges for method in session.methods)
                    rows.append(
                        ComparisonRow(name, side, _picture(report, image, model.processor, merges))
                    )
                except ValueError as error:
                    rows.append(ComparisonRow(name, error=str(error)))
            runs: dict[str, Open] = {BASELINE: nullcontext}
            for row in rows[1:]:
                if not row.error:
                    runs[row.name] = lambda name=row.name: session_of(name)  # type: ignore[misc]
            times = _times(model, inputs, runs, length, rounds, begin, say)
            done = [
                replace(row, side=_timed(row.side, times[row.name])) if row.name in times else row
                for row in rows
            ]
            say(("done", done))

        return self._worker.run(work)

    def _model(self, title: str) -> PageModel:
        if title not in self.models:
            raise ValueError(f"no such model; there are {', '.join(self.models)}")
        return self.models[title]


def _check(length: int, rounds: int) -> None:
    for what, value, low, high in (
        ("the longest answer", length, 1, MAX_LENGTH),
        ("the number of timed rounds", rounds, 0, MAX_ROUNDS),
    ):
        if not low <= value <= high:
            raise ValueError(f"{what} lies between {low} and {high}; got {value}")


def _answer(
    model: PageModel,
    inputs: Any,
    length: int,
    session: Any,
    tell: Callable[[Side], None],
) -> Side:
    """One answer under a session, told token by token, and what the report says of it."""

    def text(ids: list[int]) -> str:
        return model.processor.decode(ids, skip_special_tokens=True).strip()

    watch, allocations = Watch(lambda ids: tell(Side(text(ids)))), Allocations()
    with watched(model.net.device, allocations):
        generate(model.net, inputs, length, watch)
    report = session.report()
    return Side(
        text=text(watch.ids),
        tokens=report.final_tokens,
        average=report.average_tokens,
        new_tokens=len(watch.ids),
        peak_bytes=allocations.peak,
        kv_bytes=report.kv_bytes,
        flops=report.flops,
    )


def _times(
    model: PageModel,
    inputs: Any,
    runs: dict[str, Open],
    length: int,
    rounds: int,
    begin: Callable[[str], None],
    say: Say[Any],
) -> dict[str, Times]:
    """`race`, announced; it ends when nobody listens, without a word while the clock runs."""
    return race(
        model.net,
        inputs,
        runs,
        length,
        rounds,
        lambda i: begin(f"measuring times, round {i + 1} of {rounds}"),
        lambda: say(None),
    )


def _timed(side: Side, times: Times) -> Side:
    return replace(side, first_ms=times.first_ms, total_ms=times.total_ms)


def _picture(
    report: Report, image: Image.Image, processor: Any, merges: bool
) -> Image.Image | None:
    """Picture of kept or merged patches; None where vtc cannot tell where tokens lie."""
    try:
        return draw(report, image, processor, "groups" if merges else "kept")
    except ValueError:
        return None
