# SPDX-License-Identifier: Apache-2.0
"""The other two tabs of the page: several methods on one image, and text-to-image retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from . import pages
from .choices import MAX_QUESTION
from .engine import MAX_METHODS, Engine
from .gallery import Gallery, Ranking
from .parts import (
    ONE_AT_A_TIME,
    QUIET,
    check_upload,
    failure,
    image_input,
    line,
    opened,
    question_input,
)
from .results import BASELINE, COMPRESSED, ComparisonRow

COMPARED = ("fastv", "visionzip", "divprune", "pitome", "random")
ROUNDS = 2
SHOWN = 6
"""Images of each ranking."""


def comparison_tab(engine: Engine, tab: gr.Tab, source: list[Any]) -> None:
    """Several methods on one image; it starts with the image and question of the first tab."""
    models = list(engine.models)
    able = engine.methods[models[0]]
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            image = image_input()
            question, button = question_input("Compare")
            with gr.Group():
                model = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)
                names = gr.Dropdown(
                    list(able),
                    value=[n for n in COMPARED if n in able],
                    multiselect=True,
                    max_choices=MAX_METHODS,
                    label=f"Methods (up to {MAX_METHODS}, each by itself)",
                )
                keep = gr.Slider(1, 100, 15, step=1, label="Image tokens kept, %")
        with gr.Column(scale=7, min_width=300):
            status = line("one question, several methods, the same budget")
            table = gr.HTML(elem_id="comparison")
            chart = gr.Plot(show_label=False, elem_id="chart", visible=False)
            sheet = gr.HTML(elem_id="sheet")

    def take(mine: str | None, theirs: str | None, text: str, title: str) -> Any:
        """The inputs of the first tab, unless an image was put in here."""
        return (gr.skip(),) * 3 if mine or not theirs else (theirs, text, title)

    def usable(title: str, chosen: list[str]) -> Any:
        methods = engine.methods[title]
        return gr.update(choices=list(methods), value=[n for n in chosen if n in methods])

    def compare(
        path: str | None, text: str, title: str, chosen: list[str], percent: float
    ) -> Iterator[dict[Any, Any]]:
        try:
            asked = engine.compare(title, opened(path), text, chosen, percent / 100, rounds=ROUNDS)
            for said, rows in asked:
                done = said == "done"
                news: dict[Any, Any] = {
                    status: pages.status(said, "" if done else "busy"),
                    table: pages.comparison(rows, ROUNDS),
                }
                if done:
                    news[sheet] = pages.sheet("What each kept", _tiles(rows))
                    news[chart] = gr.update(value=pages.plot(rows), visible=True)
                yield news
        except Exception as error:
            yield {status: failure(error)}

    tab.select(take, [image, *source], [image, question, model], **QUIET)
    image.upload(check_upload, image, [image, status], **QUIET)
    model.change(usable, [model, names], names, **QUIET)
    gr.on(
        [button.click, question.submit],
        compare,
        [image, question, model, names, keep],
        [status, table, chart, sheet],
        api_name="compare",
        show_progress="hidden",
        **ONE_AT_A_TIME,
    )


def _tiles(rows: list[ComparisonRow]) -> Iterator[tuple[Any, str]]:
    for row in rows:
        if row.picture is not None:
            yield row.picture, f"{row.name}, {row.side.tokens:g} tokens: {row.side.text}"


def retrieval_tab(engine: Engine) -> None:
    """A text finds images in a built-in gallery, before and after compression of the encoder."""
    gallery = engine.gallery
    able = gallery.methods
    asked = [gallery.captions[i] for i in (10, 2, 5, 7)]
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            gr.HTML(
                '<div class="vtc-note"><p>A small text tower finds scenes in a gallery of '
                f"{len(gallery.captions)}. It was trained on whole captions: size, colour, shape, "
                "digit and place of every object, then the background. Shorter texts and other "
                "words mislead it.</p></div>",
            )
            text = gr.Textbox(
                asked[0],
                label="Description",
                lines=2,
                max_length=MAX_QUESTION,
                elem_id="description",
            )
            gr.Examples([[d] for d in asked], text, cache_examples=False, label="Examples")
            with gr.Group():
                names = gr.Dropdown(
                    able,
                    value=["pitome"],
                    multiselect=True,
                    label="Method in or behind the encoder (several make a chain)",
                )
                keep = gr.Slider(1, 100, 20, step=1, label="Image tokens kept, %")
            button = gr.Button("Search", variant="primary", elem_id="search")
        with gr.Column(scale=7, min_width=300):
            status = line("describe a scene, then search")
            summary = gr.HTML(elem_id="ranking")
            before = gr.HTML(elem_id="found-before")
            after = gr.HTML(elem_id="found-after")

    def search(description: str, chosen: list[str], percent: float) -> Iterator[dict[Any, Any]]:
        try:
            if len(description) > MAX_QUESTION:
                raise ValueError(f"a description has at most {MAX_QUESTION} characters")
            for said, found in gallery.search(description, chosen, percent / 100):
                done = said == "done"
                news: dict[Any, Any] = {status: pages.status(said, "" if done else "busy")}
                if done:
                    own, captions = description.strip(), gallery.captions
                    described = captions.index(own) if own in captions else None
                    first, then = found[BASELINE], found[COMPRESSED]
                    news |= {
                        summary: pages.ranking(found, described, SHOWN),
                        before: pages.sheet("Before compression", _best(gallery, first, first)),
                        after: pages.sheet("After compression", _best(gallery, then, first)),
                    }
                yield news
        except Exception as error:
            yield {status: failure(error)}

    gr.on(
        [button.click, text.submit],
        search,
        [text, names, keep],
        [status, summary, before, after],
        api_name="search",
        show_progress="hidden",
        **ONE_AT_A_TIME,
    )


def _best(gallery: Gallery, ranking: Ranking, before: Ranking) -> list[tuple[Any, str]]:
    """The first images with rank and similarity, and the rank before compression if it moved."""
    tiles = []
    for i, (index, score) in enumerate(zip(ranking.order[:SHOWN], ranking.scores)):
        was = before.order.index(index)
        moved = "" if was == i else f", was {was + 1}"
        tiles.append((gallery.images[index], f"{i + 1}{moved}: similarity {score:.2f}"))
    return tiles
