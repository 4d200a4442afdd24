# SPDX-License-Identifier: Apache-2.0
"""What the demo computes, without Gradio: answers, comparisons, retrieval.

One thread runs every model, one request after the other. A request is a generator of snapshots; a
caller that stops listening ends the work at the next token. Nothing of a request is kept here: what
a caller got is all there is of it. Only the embeddings of the built-in gallery are remembered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from queue import SimpleQueue
from random import sample
from typing import Any, TypeVar

import torch
from PIL import Image

from ..benchmarks.tasks import scenes
from ..pictures import overlay
from ..report import Report
from ..wrapping import compressing, observe
from .choices import ENCODER_STAGES, Model, make, usable
from .measuring import Open, Watch, generate, peak_memory, race

T = TypeVar("T")
BASELINE, COMPRESSED = "uncompressed", "compressed"
MAX_LENGTH, MAX_ROUNDS, MAX_METHODS = 256, 9, 8
GALLERY = 12
"""Scenes that the retrieval tab searches."""
PICTURE = 640
"""Longer side of a picture in pixels."""


class _Left(Exception):
    """Nobody listens any more."""


@dataclass(frozen=True)
class Side:
    """One configuration on one prompt; None is what was not measured (yet).

    Attributes:
        tokens: image tokens that the last layer of the LLM processed; average: over its layers.
        first_ms, total_ms: to the first and the last token; new_tokens: of the answer.
        peak_bytes: see `demos.measuring.peak_memory`; kv_bytes: of the KV cache after the prompt.
        flops: of the LLM for image tokens.
    """

    text: str = ""
    tokens: float | None = None
    average: float | None = None
    new_tokens: int | None = None
    first_ms: float | None = None
    total_ms: float | None = None
    peak_bytes: int | None = None
    kv_bytes: int | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Answer:
    """A snapshot of a request: what is known so far of both sides."""

    status: str
    method: str
    sides: dict[str, Side]
    report: Report | None = None
    done: bool = False


@dataclass(frozen=True)
class Row:
    """A method of a comparison; ``error`` says why it has no answer."""

    name: str
    side: Side = Side()
    picture: Image.Image | None = None
    error: str = ""


@dataclass(frozen=True)
class Ranking:
    """The gallery by similarity to a text, best first, and what its embedding took.

    Attributes:
        hits: scenes that come first for their own caption.
    """

    order: list[int]
    scores: list[float]
    hits: int
    tokens: float
    ms_per_image: float


def draw(
    report: Report, image: Image.Image, processor: Any, kind: Any = "kept", layer: Any = None
) -> Image.Image:
    """`vtc.overlay` at the size of the page.

    Raises:
        ValueError: this method or step has no such picture; the text says why.
    """
    return overlay(report, image, processor=processor, kind=kind, layer=layer, size=PICTURE)


class Engine:
    """Models and the one thread that runs them."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = {model.title: model for model in models}
        self.methods = {model.title: usable(model.net) for model in models}
        with peak_memory(torch.device("cpu")):  # torch's profiler wants the main thread first
            pass
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._embedded: dict[str, tuple[Any, float, float]] = {}

    def close(self) -> None:
        """End the thread; what still waits is dropped."""
        self._thread.shutdown(cancel_futures=True)

    def _run(self, work: Callable[[Callable[[T | None], None]], None]) -> Iterator[T]:
        """Do ``work(say)`` on the model's thread and yield what it says, as it says it.

        ``say(None)`` says nothing, but like every call it ends the work when nobody listens.
        """
        box: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        left = threading.Event()

        def say(news: T | None) -> None:
            if left.is_set():
                raise _Left
            if news is not None:
                box.put(("news", news))

        def job() -> None:
            try:
                if not left.is_set():
                    work(say)
            except _Left:
                pass
            except BaseException as error:  # every way to end must reach the one who waits
                box.put(("error", error))
            box.put(("end", None))

        self._thread.submit(job)
        try:
            while True:
                what, news = box.get()
                if what == "end":
                    return
                if what == "error":
                    raise news
                yield news
        finally:
            left.set()

    # ---- answers -------------------------------------------------------------------------------

    def answer(
        self,
        title: str,
        image: Image.Image,
        question: str,
        names: Sequence[str],
        keep: float,
        length: int = 32,
        rounds: int = 3,
    ) -> Iterator[Answer]:
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
        length, rounds = _within(length, 1, MAX_LENGTH), _within(rounds, 0, MAX_ROUNDS)
        net = model.net
        session_of: dict[str, Open] = {
            BASELINE: lambda: observe(net),
            COMPRESSED: lambda: compressing(net, method),
        }

        def work(say: Callable[[Answer | None], None]) -> None:
            now = Answer("reading the image", str(method), {BASELINE: Side(), COMPRESSED: Side()})
            say(now)
            inputs = model.inputs(image, question)
            for name in sample(list(session_of), 2):
                now = replace(now, status=f"answering, {name}")

                def tell(side: Side, name: str = name) -> None:
                    nonlocal now
                    now = replace(now, sides={**now.sides, name: side})
                    say(now)

                with session_of[name]() as session:
                    tell(_answer(model, inputs, length, session, tell))
                    if name == COMPRESSED:
                        now = replace(now, report=session.report())
            timed: dict[str, Open] = {**session_of, BASELINE: nullcontext}

            def begin(round_: int) -> None:
                nonlocal now
                now = replace(now, status=f"measuring times, round {round_ + 1} of {rounds}")
                say(now)

            times = race(net, inputs, timed, length, rounds, begin, lambda: say(None))
            sides = {
                name: replace(side, first_ms=times[name].first_ms, total_ms=times[name].total_ms)
                for name, side in now.sides.items()
            }
            say(replace(now, sides=sides, status="done", done=True))

        return self._run(work)

    # ---- comparison ----------------------------------------------------------------------------

    def compare(
        self,
        title: str,
        image: Image.Image,
        question: str,
        names: Sequence[str],
        keep: float,
        length: int = 16,
        rounds: int = 2,
    ) -> Iterator[tuple[str, list[Row]]]:
        """(status, rows so far) of the stock model and several methods on one question.

        A method that cannot do it gets a row that says why. Times as in `answer`.

        Raises:
            ValueError: as `answer`, and more than `MAX_METHODS` methods.
        """
        model = self._model(title)
        methods = {name: make([name], keep) for name in names}
        if not 0 < len(methods) <= MAX_METHODS:
            raise ValueError(f"choose between 1 and {MAX_METHODS} methods")
        length, rounds = _within(length, 1, MAX_LENGTH), _within(rounds, 0, MAX_ROUNDS)

        def session_of(name: str) -> Any:
            if name == BASELINE:
                return observe(model.net)
            return compressing(model.net, methods[name])

        def work(say: Callable[[tuple[str, list[Row]] | None], None]) -> None:
            say(("reading the image", []))
            inputs = model.inputs(image, question)
            rows: list[Row] = []
            for name in [BASELINE, *methods]:
                say((f"answering, {name}", list(rows)))
                try:
                    with session_of(name) as session:
                        side = _answer(model, inputs, length, session, lambda side: say(None))
                        report = session.report()
                    rows.append(Row(name, side, _picture(report, image, model.processor)))
                except ValueError as error:
                    rows.append(Row(name, error=str(error)))
            runs: dict[str, Open] = {
                row.name: nullcontext if row.name == BASELINE else _opener(session_of, row.name)
                for row in rows
                if not row.error
            }

            def begin(round_: int) -> None:
                say((f"measuring times, round {round_ + 1} of {rounds}", list(rows)))

            times = race(model.net, inputs, runs, length, rounds, begin, lambda: say(None))
            rows = [
                replace(
                    row,
                    side=replace(
                        row.side,
                        first_ms=times[row.name].first_ms,
                        total_ms=times[row.name].total_ms,
                    ),
                )
                if row.name in times
                else row
                for row in rows
            ]
            say(("done", rows))

        return self._run(work)

    # ---- retrieval -----------------------------------------------------------------------------

    @cached_property
    def tower(self) -> Any:
        """The embedded retrieval model."""
        from ..benchmarks import towers

        return towers.load(None)

    @cached_property
    def captions(self) -> list[str]:
        """A full caption of each image of the gallery."""
        return [scenes.caption(scene) for scene in _scenes()]

    @cached_property
    def gallery(self) -> list[Image.Image]:
        """Scenes of the test split, none of which the embedded models were trained on."""
        return [scenes.render(scene) for scene in _scenes()]

    @cached_property
    def encoder_methods(self) -> list[str]:
        """The methods that work on the tower of the retrieval model."""
        return list(usable(self.tower.vision, ENCODER_STAGES))

    def search(
        self, text: str, names: Sequence[str], keep: float
    ) -> Iterator[tuple[str, dict[str, Ranking]]]:
        """(status, rankings so far) of the gallery for a text, without and with compression of the
        image encoder.

        Raises:
            ValueError: no text, or a method that does not work on an encoder alone.
        """
        if not text.strip():
            raise ValueError("describe a scene first")
        method = make(names, keep)

        def work(say: Callable[[tuple[str, dict[str, Ranking]] | None], None]) -> None:
            found: dict[str, Ranking] = {}
            own = self.tower.encode_texts(self.captions)
            asked = self.tower.encode_texts([text])[0]
            for name, chosen in ((BASELINE, None), (COMPRESSED, method)):
                images, tokens, ms = self._embed(
                    chosen, lambda done, name=name: say((f"{name}, image {done + 1}", dict(found)))
                )
                near = (images @ asked).tolist()
                order = sorted(range(len(near)), key=lambda i: -near[i])
                first = (own @ images.T).argmax(1).tolist()
                hits = sum(i == best for i, best in enumerate(first))
                found[name] = Ranking(order, [near[i] for i in order], hits, tokens, ms)
            say(("done", found))

        return self._run(work)

    def _embed(self, method: Any, tick: Callable[[int], None]) -> tuple[Any, float, float]:
        """Embeddings (images, D) of the gallery, patch tokens left, milliseconds for an image."""
        key = str(method)
        if key not in self._embedded:
            vision = self.tower.vision
            with observe(vision) if method is None else compressing(vision, method) as session:
                rows, times = [], []
                for i, image in enumerate(self.gallery):
                    tick(i)
                    pixels = self.tower.pixels([image])
                    start = time.perf_counter()
                    rows.append(self.tower.encode(pixels))
                    times.append(1e3 * (time.perf_counter() - start))
                tokens = session.report().final_tokens
            while len(self._embedded) >= 32:  # whoever asked last is the likeliest to ask again
                del self._embedded[next(iter(self._embedded))]
            self._embedded[key] = torch.cat(rows), tokens, sorted(times)[len(times) // 2]
        return self._embedded[key]

    def _model(self, title: str) -> Model:
        if title not in self.models:
            raise ValueError(f"no such model; there are {', '.join(self.models)}")
        return self.models[title]


def _scenes() -> list[scenes.Scene]:
    return [scenes.make_scene(i, seed=7) for i in range(GALLERY)]


def _within(value: float, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ValueError(f"{value:g} is out of range; between {low} and {high}")
    return int(value)


def _opener(session_of: Callable[[str], Any], name: str) -> Open:
    return lambda: session_of(name)


def _answer(
    model: Model,
    inputs: Any,
    length: int,
    session: Any,
    tell: Callable[[Side], None] = lambda side: None,
) -> Side:
    """One answer under a session, told token by token, and what the report says of it."""

    def text(ids: list[int]) -> str:
        return model.processor.decode(ids, skip_special_tokens=True).strip()

    watch = Watch(lambda ids: tell(Side(text(ids))))
    with peak_memory(model.net.device) as peak:
        generate(model.net, inputs, length, watch)
    report = session.report()
    return Side(
        text=text(watch.ids),
        tokens=report.final_tokens,
        average=report.average_tokens,
        new_tokens=len(watch.ids),
        peak_bytes=peak.bytes,
        kv_bytes=report.kv_bytes,
        flops=report.flops,
    )


def _picture(report: Report, image: Image.Image, processor: Any) -> Image.Image | None:
    """What a method did to the image; None where vtc cannot tell where its tokens lie."""
    kind = "groups" if report.reduction is not None else "kept"
    try:
        return draw(report, image, processor, kind)
    except ValueError:
        return None
