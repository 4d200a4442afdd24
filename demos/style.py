# SPDX-License-Identifier: Apache-2.0
"""The look of the page: fonts that are on the machine already, and CSS."""

from __future__ import annotations

import gradio as gr

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    """Gradio's default theme without fonts from elsewhere."""
    return gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=MONO)


CSS = """
:root { --soft: #5b6878; }
.dark { --soft: #a3b0c0; }
.gradio-container {
  max-width: 1200px !important; margin: 0 auto !important;
  & .html-container { padding: 0 !important; }
  & #picture { border-width: 0 !important; }
  & #chart img { max-width: min(540px, 100%); height: auto; margin: 0 auto; }
  @media (max-width: 640px) { & .app { padding: 12px 10px !important; } }
}
.gradio-container .prose {
  & .vtc-head h1 { font-size: 1.4rem; font-weight: 650; margin: 0 0 .15rem; }
  & .vtc-head p { margin: 0 0 .2rem; color: var(--soft); font-size: .95rem; }
  & .vtc-note { font-size: .8rem; line-height: 1.45; color: var(--soft); }
  & .vtc-note p { margin: .15rem 0; color: inherit; font-size: inherit; line-height: inherit; }
  & .vtc-note b { color: var(--body-text-color); }
  & .vtc-status { padding: .5rem .75rem; border-radius: 6px; font-size: .9rem;
    background: var(--background-fill-secondary); border-left: 4px solid var(--neutral-400); }
  & .vtc-status.busy { border-left-color: var(--primary-500); }
  & .vtc-status.bad { border-left-color: #d03b3b; }
  & .vtc-box, & .vtc-card { border: 1px solid var(--border-color-primary); border-radius: 8px;
    background: var(--background-fill-primary); }
  & .vtc-box { padding: .3rem .7rem .5rem; }
  & .vtc-card { padding: .6rem .9rem; min-height: 5.2rem; }
  & .vtc-card.before { border-top: 3px solid var(--neutral-400); }
  & .vtc-card.after { border-top: 3px solid var(--primary-500); }
  & .vtc-card .who { font-size: .78rem; color: var(--soft); margin-bottom: .25rem; }
  & .vtc-card .said { font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere;
    min-height: 1.9rem; max-height: 14rem; overflow-y: auto; }
  & table.vtc { width: 100%; margin: 0; border: 0; border-collapse: collapse; font-size: .88rem;
    & tr { border: 0; background: none; }
    & th, & td { padding: .34rem .4rem; border: 0; text-align: right;
      border-bottom: 1px solid var(--border-color-primary);
      white-space: nowrap; font-variant-numeric: tabular-nums; }
    & th { font-weight: 600; font-size: .78rem; color: var(--soft); white-space: normal;
      vertical-align: bottom; }
    & tbody tr:last-child td { border-bottom: 0; }
    & tr.first td { font-weight: 600; }
    & th:first-child, & td:first-child, & .left { text-align: left; white-space: normal; }
    & .left, & td.answer { padding-left: .5rem; }
    & td.answer { text-align: left; white-space: normal; overflow-wrap: anywhere; }
    & td.why { text-align: left; white-space: normal; font-size: .82rem; color: var(--soft); }
    & td.absent { color: var(--soft); white-space: normal; }
  }
  & .vtc-title { font-weight: 600; font-size: .9rem; margin: .2rem 0 .45rem; }
  & .vtc-sheet { display: grid; gap: .7rem; grid-template-columns: repeat(3, minmax(0, 1fr)); }
  & .vtc-sheet figure { margin: 0; }
  & .vtc-sheet img { width: 100%; height: auto; display: block; border-radius: 4px; margin: 0; }
  & .vtc-sheet figcaption { font-size: .8rem; line-height: 1.3; padding-top: .25rem;
    overflow-wrap: anywhere; }
  @media (max-width: 640px) {
    & .vtc-box { padding: .25rem .45rem .4rem; }
    & .vtc-sheet { gap: .4rem; }
    & table.vtc { font-size: .79rem;
      & th { font-size: .69rem; }
      & th, & td { padding: .3rem .16rem; }
    }
  }
}
"""
