# SPDX-License-Identifier: Apache-2.0
"""Parts that the tabs of the page share: inputs, the status line, messages of failures."""

from __future__ import annotations

import logging
from typing import Any

import gradio as gr

from . import pages
from .choices import MAX_QUESTION
from .uploads import read_image

log = logging.getLogger("vtc.demos")
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def path_of(payload: Any) -> str | None:
    """The path of an uploaded file, in place of Gradio's own reading, which decodes it."""
    if payload is None:
        return None
    if not payload.path or (payload.url or "").startswith("data:"):
        raise gr.Error("upload the image as a file")
    return payload.path


def image_input(value: Any = None) -> gr.Image:
    """An upload of one image, with what is taken written under it."""
    image = gr.Image(
        value,
        label="Image",
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        height=210,
    )
    image.preprocess = path_of  # type: ignore[method-assign]
    gr.HTML(pages.limits())
    return image


def question_input(button: str, value: str = "") -> tuple[gr.Textbox, gr.Button]:
    """A question and the button that asks it."""
    with gr.Row(equal_height=True):
        question = gr.Textbox(
            value,
            label="Question",
            max_length=MAX_QUESTION,
            scale=4,
            min_width=150,
            elem_id=f"question-{button.lower()}",
        )
        asked = gr.Button(button, variant="primary", scale=1, min_width=84, elem_id=button.lower())
    return question, asked


def line(text: str) -> gr.HTML:
    """The status line of a tab."""
    return gr.HTML(pages.status(text))


def opened(path: str | None) -> Any:
    """The uploaded image, or a ValueError for the user."""
    if not path:
        raise ValueError("upload an image or pick an example first")
    return read_image(path)


def check_upload(path: str | None) -> tuple[Any, str]:
    """Right after an upload: the file stays, or is taken out with the reason."""
    try:
        opened(path)
    except ValueError as error:
        return None, pages.status(str(error), "bad")
    return gr.skip(), pages.status("ready: ask a question about the image")


def failure(error: Exception) -> str:
    """Message of a failure: the reason if it is the user's, else only that there is one."""
    if isinstance(error, ValueError):
        return pages.status(str(error), "bad")
    log.error("a request failed", exc_info=error)
    kind = type(error).__name__
    return pages.status(f"this request failed ({kind}); the log of the server says why", "bad")
