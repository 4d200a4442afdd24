# SPDX-License-Identifier: Apache-2.0
"""The page: Gradio tabs around one engine. Nothing of a user is kept outside their session."""

from __future__ import annotations

import gradio as gr

from . import pages
from .ask import KEPT_FOR, ask_tab
from .engine import Engine
from .loading import CAUTION, EMBEDDED
from .tabs import comparison_tab, retrieval_tab


def build(engine: Engine) -> gr.Blocks:
    """The whole page."""
    notes = [
        f"{model.title} knows {model.knows}." for model in engine.models.values() if model.knows
    ]
    if any(title in engine.models for title, _ in EMBEDDED.values()):
        notes.append(CAUTION)
    with gr.Blocks(
        title="vtc: visual token compression",
        analytics_enabled=False,
        delete_cache=(600, KEPT_FOR),
    ) as page:
        gr.HTML(pages.head(" ".join(notes)))
        with gr.Tab("Ask"):
            source = ask_tab(engine)
        with gr.Tab("Compare methods") as tab:
            comparison_tab(engine, tab, source)
        with gr.Tab("Retrieval"):
            retrieval_tab(engine)
    return page.queue(default_concurrency_limit=4, max_size=64)
