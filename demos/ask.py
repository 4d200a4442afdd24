# SPDX-License-Identifier: Apache-2.0
"""The main tab: one question with and without compression, numbers, pictures, the snippet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..method import PLACES
from . import pages
from .choices import snippet
from .engine import MAX_LENGTH, MAX_ROUNDS, Engine, draw
from .examples import EXAMPLES
from .loading import EMBEDDED
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
from .results import BASELINE, COMPRESSED, Side

ANYWHERE = "anywhere"
KINDS = [("kept patches", "kept"), ("merge groups", "groups"), ("score heat map", "scores")]
LEGENDS = {
    "kept": "Patches of dropped tokens are dimmed.",
    "groups": "Patches merged into one token share a colour and an outline.",
    "scores": "What the tokens were ranked by.",
}
KEPT_FOR = 1800
"""Seconds for which the last result of a session can be redrawn."""
TO_THE_ANSWER = """() => {
  if (innerWidth < 700) document.getElementById("before").scrollIntoView({behavior: "smooth"});
}"""
"""On a phone the answers stand below the settings."""


def ask_tab(engine: Engine) -> list[Any]:
    """The main tab; returns its image, question and model inputs."""
    models, start = list(engine.models), EXAMPLES[0]
    known = {loader: title for loader, (title, _) in EMBEDDED.items()}
    title_of = {k: t if t in engine.models else models[0] for k, t in known.items()}
    first = title_of[start.loader]
    usual = ["fastv"] if "fastv" in engine.methods[first] else list(engine.methods[first])[:1]

    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=300):
            image = image_input(start.draw())
            examples = gr.Dataset(
                components=[gr.Image(visible=False, render=False, format="png")],
                samples=[[example.draw()] for example in EXAMPLES],
                samples_per_page=len(EXAMPLES),
                type="index",
                label="Examples",
                elem_id="examples",
            )
            question, button = question_input("Ask", start.question)
            with gr.Group():
                with gr.Row():
                    model = gr.Dropdown(
                        models, value=first, label="Model", min_width=120, visible=len(models) > 1
                    )
                    stage = gr.Dropdown(
                        [ANYWHERE, *PLACES.values()],
                        value=ANYWHERE,
                        label="Methods that act",
                        min_width=120,
                    )
                names = gr.Dropdown(
                    list(engine.methods[first]),
                    value=usual,
                    multiselect=True,
                    label="Method (several make a chain)",
                    elem_id="methods",
                )
                keep = gr.Slider(1, 100, 25, step=1, label="Image tokens kept, %", elem_id="keep")
            told = gr.HTML(pages.about(usual))
            with gr.Accordion("Settings", open=False):
                length = gr.Slider(1, MAX_LENGTH, 32, step=1, label="Longest answer, tokens")
                rounds = gr.Slider(0, MAX_ROUNDS, 3, step=1, label="Timed rounds")
        with gr.Column(scale=7, min_width=300):
            status = line("ready: press Ask, or choose another image, question and method")
            with gr.Row():
                before = gr.HTML(pages.card(BASELINE, Side()), elem_id="before", min_width=150)
                after = gr.HTML(pages.card(COMPRESSED, Side()), elem_id="after", min_width=150)
            table = gr.HTML(elem_id="figures")
            with gr.Group(visible=False) as pictures:
                kind = gr.Radio(KINDS, value="kept", label="Picture", elem_id="kind")
                layer = gr.Slider(0, 1, 0, step=1, label="Layer", visible=False, elem_id="layer")
                picture = gr.Image(
                    show_label=False,
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="picture",
                    height=400,
                )
                caption = gr.HTML(elem_id="caption")
            code = gr.Code(
                snippet(engine.models[first], start.question, usual, 0.25, 32),
                language="python",
                label="The same in Python",
                interactive=False,
                wrap_lines=True,
                elem_id="code",
            )
    shown = gr.State(None, time_to_live=KEPT_FOR)

    def settings_changed(title: str, text: str, chosen: list[str], percent: float, n: float) -> Any:
        try:
            lines = snippet(engine.models[title], text, chosen, percent / 100, int(n))
        except ValueError as error:
            lines = f"# {error}"
        return lines, pages.about(chosen)

    def filtered(title: str, where: str, chosen: list[str]) -> Any:
        """The methods of a stage that work on the model, and those chosen already."""
        able = engine.methods[title]
        left = [n for n in chosen if n in able]
        there = [n for n, s in able.items() if where == ANYWHERE or where in map(PLACES.get, s)]
        return gr.update(choices=sorted({*there, *left}), value=left)

    def ask(
        path: str | None,
        text: str,
        title: str,
        chosen: list[str],
        percent: float,
        n: float,
        timed: float,
    ) -> Iterator[dict[Any, Any]]:
        try:
            asked = opened(path)
            for now in engine.answer(title, asked, text, chosen, percent / 100, int(n), int(timed)):
                news = {
                    status: pages.outcome(now),
                    before: pages.card(BASELINE, now.sides[BASELINE]),
                    after: pages.card(COMPRESSED, now.sides[COMPRESSED]),
                    table: pages.figures(now, int(timed)),
                }
                if now.done:
                    result = (now.report, asked, title)
                    news |= redraw(result, "kept", None)
                    news |= {shown: result, kind: "kept", pictures: gr.update(visible=True)}
                yield news
        except Exception as error:
            yield {status: failure(error)}

    def redraw(result: Any, which: str, step: float | None) -> dict[Any, Any]:
        """The picture at a step; None is the last one."""
        if result is None:
            return {caption: pages.status("this result is no longer kept: ask again")}
        report, asked, title = result
        steps = report.stages()
        at = len(steps) if step is None else min(int(step), len(steps))
        label, tokens = steps[at - 1] if at else ("at first", report.visual_tokens)
        text = f"{label}: {tokens:g} of {report.visual_tokens:g} tokens."
        slider = gr.update(
            maximum=max(1, len(steps)),
            value=at,
            visible=bool(steps),
            label=f"Layer, step {at} of {len(steps)}: {label}",
        )
        try:
            processor = engine.models[title].processor
            drawn = draw(report, asked, processor, which, label) if at else asked
        except ValueError as error:
            return {picture: None, caption: pages.status(f"{text} {error}"), layer: slider}
        return {picture: drawn, caption: pages.status(f"{text} {LEGENDS[which]}"), layer: slider}

    def pick(index: int) -> Any:
        example = EXAMPLES[index]
        strange = "" if example.known else "; the embedded models were not trained on such images"
        text = f"example, {example.kind}: the right answer is {example.answer}{strange}"
        return example.draw(), example.question, title_of[example.loader], pages.status(text)

    image.upload(check_upload, image, [image, status], **QUIET)
    examples.click(pick, examples, [image, question, model, status], **QUIET)
    gr.on(
        [c.change for c in (model, question, names, keep, length)],
        settings_changed,
        [model, question, names, keep, length],
        [code, told],
        queue=False,
        trigger_mode="always_last",
        **QUIET,
    )
    gr.on([model.change, stage.change], filtered, [model, stage, names], names, **QUIET)
    gr.on(
        [button.click, question.submit],
        ask,
        [image, question, model, names, keep, length, rounds],
        [status, before, after, table, pictures, picture, caption, kind, layer, shown],
        api_name="ask",
        show_progress="hidden",
        **ONE_AT_A_TIME,
    )
    button.click(None, js=TO_THE_ANSWER, api_visibility="private")
    gr.on(
        [kind.input, layer.input],
        redraw,
        [shown, kind, layer],
        [picture, caption, layer],
        trigger_mode="always_last",
        **QUIET,
    )
    return [image, question, model]
