# SPDX-License-Identifier: Apache-2.0
"""Pictures of the README and of the documentation, drawn from the code and from result files.

python docs/pictures/make.py              all of them
python docs/pictures/make.py stages.svg   one
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

INK, SOFT, LINE = "#1f2937", "#5b6472", "#b6bdc9"
BLUE, AMBER, GREEN, GREY = "#dbe7fb", "#fdeccb", "#d9f0dd", "#eef0f3"

# ---- SVG ---------------------------------------------------------------------------------------


def text(x: float, y: float, words: str, size: float = 14, **how: str) -> str:
    """A line of text; `how` are attributes, with _ for -."""
    given = {"fill": INK, "text_anchor": "middle", **how}
    attributes = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in given.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" {attributes}>{escape(words)}</text>'


def box(x: float, y: float, w: float, h: float, fill: str = "white", **how: str) -> str:
    """A rectangle with round corners."""
    given = {"stroke": LINE, "rx": "6", **how}
    attributes = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in given.items())
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" {attributes}/>'


def line(x1: float, y1: float, x2: float, y2: float, arrow: bool = True, **how: str) -> str:
    """A straight line, with an arrow at its end."""
    given = {"stroke": SOFT, "stroke_width": "1.5", **how}
    attributes = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in given.items())
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" {attributes}{end}/>'


def mono(x: float, y: float, words: str, size: float = 13, **how: str) -> str:
    """A line of text in a font of fixed width."""
    return text(x, y, words, size, font_family="ui-monospace, Menlo, Consolas, monospace", **how)


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """An SVG on white, so that it reads on a light and on a dark page."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="system-ui, Helvetica, Arial, sans-serif">'
    )
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{SOFT}"/></marker></defs>'
    )
    ground = f'<rect width="{width}" height="{height}" rx="10" fill="white"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", arrow, ground, *parts, "</svg>\n"])


# ---- the stages of a model -----------------------------------------------------------------------


def by_stage() -> dict[str, list[str]]:
    """Names of the methods that act in each stage."""
    from vtc.method import PLACES
    from vtc.registry import known_methods

    made = {name: cls().stages for name, cls in known_methods().items()}
    return {stage: [n for n, stages in made.items() if stage in stages] for stage in PLACES}


def stages() -> str:
    """Drawing of the stages of a model at which hooks of a method run."""
    from vtc.method import PLACES, STAGE_HOOKS

    parts = []
    # The model, from the left to the right.
    parts += [box(20, 96, 84, 84, GREY)]
    for i in (1, 2, 3):
        at = 21 * i
        thin = {"stroke": LINE, "stroke_width": "1"}
        parts += [line(20 + at, 96, 20 + at, 180, False, **thin)]
        parts += [line(20, 96 + at, 104, 96 + at, False, **thin)]
    parts += [text(66, 84, "image, in patches", 13, fill=SOFT)]
    parts += [box(158, 96, 176, 84, BLUE), text(246, 84, "vision encoder", 13, fill=SOFT)]
    parts += [box(167 + 41 * i, 108, 34, 60) for i in range(4)]
    parts += [text(184 + 41 * i, 143, w, 12) for i, w in enumerate(("1", "2", "...", "n"))]
    parts += [box(364, 108, 76, 60, BLUE), text(402, 143, "projector", 13)]
    parts += [box(506, 96, 298, 84, AMBER), text(560, 84, "LLM, prefill", 13, fill=SOFT)]
    parts += [box(517 + 58 * i, 108, 44, 60) for i in range(5)]
    parts += [text(539 + 58 * i, 143, w, 12) for i, w in enumerate(("1", "2", "3", "...", "n"))]
    parts += [box(506, 192, 298, 36, GREEN), text(735, 215, "KV cache", 13)]
    parts += [line(104, 138, 156, 138), line(334, 138, 362, 138), line(440, 138, 504, 138)]
    parts += [line(804, 138, 830, 138), text(856, 143, "answer", 13)]
    # Tokens that go around a layer.
    parts += [
        f'<path d="M626 106 C 628 66, 682 66, 684 106" fill="none" stroke="{SOFT}" '
        'stroke-width="1.5" marker-end="url(#arrow)"/>'
    ]
    # The hooks, each below what it acts on: x of the label, and (x, y) of that place.
    spots = {
        "pixels": (84, 130, 144),
        "vision": (233, 246, 168),
        "features": (382, 472, 144),
        "decoder": (531, 568, 144),
        "cache": (680, 655, 222),
        "bypass": (829, 655, 76),
    }
    found, top = by_stage(), 288
    for stage, (x, px, py) in spots.items():
        way = f"M{px} {py} L{px} 260 L{x} 260 L{x} {top}"
        if stage == "bypass":
            way = f"M{px} {py} L{px} 44 L896 44 L896 268 L{x} 268 L{x} {top}"
        parts += [f'<path d="{way}" fill="none" stroke="{AMBER_LINE}" stroke-width="1.5"/>']
        parts += [f'<circle cx="{px}" cy="{py}" r="4.5" fill="{AMBER_LINE}"/>']
        hook = STAGE_HOOKS[stage]  # type: ignore[index]
        parts += [box(x - 70, top, 140, 30, "#fff7e6", stroke=AMBER_LINE)]
        parts += [mono(x, top + 20, hook, font_weight="600")]
        parts += [text(x, top + 52, PLACES[stage], 14)]
        names = found[stage]
        shown, more = names[:3], len(names) - 3
        rows = [*shown, *([f"and {more} more"] if more > 0 else [])]
        parts += [mono(x, top + 74 + 17 * i, n, 12.5, fill=SOFT) for i, n in enumerate(rows)]
    return drawing(910, 430, "Where the hooks of a method run", parts)


AMBER_LINE = "#b7791f"

# ---- the house -----------------------------------------------------------------------------------

FLOORS: tuple[tuple[tuple[str, str, str], ...], ...] = (
    (("cli/", "the command vtc", GREY),),
    (("demos/", "the page in the browser", GREY),),
    (("benchmarks/", "tasks, metrics, speed, tables", GREY),),
    (
        ("tuning/", "match, calibrate", GREY),
        ("inspection", "what works on a model", GREY),
        ("precompute", "compress_inputs", GREY),
    ),
    (("session", "wrap, unwrap, compressing, observe", AMBER),),
    (("report/", "tokens, FLOPs, bytes, pictures", GREEN),),
    (
        ("engine/vision/", "encoder side: resize, blocks, features", BLUE),
        ("engine/llm/", "LLM side: prompt, layers, cache stage", BLUE),
    ),
    (("engine/", "handoff, record, finite, refusals", BLUE),),
    (("methods/", "one file for each method", AMBER),),
    (("registry, method", "Method, Scorer, Chain and their hooks", AMBER),),
    (("views/", "what a hook may see", AMBER),),
    (
        ("adapters/", "where things are in a model", GREEN),
        ("cache/", "pruned, packed layers", GREEN),
    ),
    (("hooks/", "threads, attention rows and patches", GREEN),),
    (("layouts, budgets, hyperparameters", "crops and grids, schedules, checks", GREY),),
    (
        ("reduction", "which tokens survive", GREY),
        ("errors", "what vtc raises", GREY),
        ("kernels/", "fused operators", GREY),
    ),
)
"""Rooms from top to bottom; a room may import what stands below it."""

STEPS = {"session": "1", "adapters/": "1", "engine/vision/": "2 3", "engine/": "3",
         "methods/": "3 5", "engine/llm/": "4 5", "cache/": "6", "report/": "7"}  # fmt: skip
"""Places of the numbered steps of docs/architecture.md."""


def architecture() -> str:
    """The rooms of vtc, and the way of one image through them."""
    width, left, tall, gap, parts = 780, 52, 40, 8, []
    inner = width - left - 20
    for i, floor in enumerate(FLOORS):
        y = 24 + i * (tall + gap)
        wide = (inner - gap * (len(floor) - 1)) / len(floor)
        for j, (name, what, fill) in enumerate(floor):
            x = left + j * (wide + gap)
            numbers = STEPS.get(name, "").split()
            parts += [box(x, y, wide, tall, fill)]
            if len(floor) > 1:
                parts += [mono(x + 14, y + 17, name, 13, text_anchor="start", font_weight="600")]
                parts += [text(x + 14, y + 33, what, 12, text_anchor="start", fill=SOFT)]
            else:
                parts += [mono(x + 14, y + 25, name, 13, text_anchor="start", font_weight="600")]
                parts += [text(x + 290, y + 25, what, 13, text_anchor="start", fill=SOFT)]
            for k, number in enumerate(reversed(numbers)):
                cx = x + wide - 22 - 28 * k
                parts += [f'<circle cx="{cx:g}" cy="{y + 20:g}" r="11" fill="{INK}"/>']
                parts += [text(cx, y + 24.5, number, 13, fill="white", font_weight="600")]
    bottom = 24 + len(FLOORS) * (tall + gap) - gap
    parts += [line(32, 30, 32, bottom)]
    parts += [
        f'<text x="22" y="{bottom / 2 + 10:g}" font-size="13" fill="{SOFT}" text-anchor="middle" '
        f'transform="rotate(-90 22 {bottom / 2 + 10:g})">imports</text>'
    ]
    return drawing(width, bottom + 24, "The rooms of vtc and who may import whom", parts)


# ---- what is kept of an image --------------------------------------------------------------------

ASKED = (6, 8)
"""Questions of the test split of scenes, both about its second image."""
TOKENS = 64


def kept() -> Any:
    """An image, the patches that are left of it at 576 and at 64 tokens, and the answers."""
    from PIL import Image, ImageDraw, ImageFont

    import vtc
    from vtc.benchmarks.accuracy.kept_sheet import answered
    from vtc.benchmarks.tasks.registry import Task
    from vtc.benchmarks.tiny.models import load_llava
    from vtc.methods.random import Random
    from vtc.methods.vscan import VScan

    model, processor = load_llava()
    task = Task("scenes", n=500)
    first, second = (task[i] for i in ASKED)
    vscan, chance = VScan(keep_tokens=TOKENS), Random(keep_tokens=TOKENS)
    stock = Random(keep_ratio=1.0)  # keeps all
    side, gap, tall = 420, 24, 128
    tiles = []
    for method, item in ((stock, first), (vscan, first), (vscan, second), (chance, first)):
        answer, report = answered(model, processor, item.image, item.question, method, 8)
        picture = vtc.overlay(report, item.image, processor=processor, size=side)
        name = "no compression" if method is stock else method.name
        if method is chance:
            name += " (control)"
        tiles.append((picture, f"{report.final_tokens:g} tokens, {name}", item, answer))
    font, bold = ImageFont.load_default(24), ImageFont.load_default(27)
    sheet = Image.new("RGB", (gap + len(tiles) * (side + gap), side + tall + 2 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, head, item, answer) in enumerate(tiles):
        x, y = gap + i * (side + gap), gap
        draw.text((x, y), head, fill=INK, font=bold)
        sheet.paste(picture, (x, y + 42))
        y += 42 + side + 12
        draw.text((x, y), item.question, fill=SOFT, font=font)
        right = answer == item.answer
        said = answer if right else f"{answer}, wrong: it is {item.answer}"
        draw.text((x, y + 34), said, fill="#157347" if right else "#b02a37", font=bold)
    return sheet


# ---- quality against cost ------------------------------------------------------------------------


def pareto(path: Path) -> None:
    """Accuracy against FLOPs, from the rows of a result file."""
    import matplotlib
    from matplotlib.figure import Figure

    from vtc.benchmarks.pages.plots import draw_front, names_of

    result = json.loads((ROOT / "benchmarks/results/scenes.json").read_text("utf-8"))
    rows = [row for row in result["rows"] if row["error"] is None]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "vtc", "font.size": 11}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        axis = figure.subplots()
        names = dict.fromkeys([*names_of(rows, ["flops_share"]), "fastv"])
        draw_front(axis, rows, "flops_share", list(names))
        axis.set_ylim(45, 98)
        axis.set_xlim(0, 1.03)
        axis.set_xlabel("share of the LLM's FLOPs for image tokens that is left")
        axis.set_ylabel(f"right of {result['questions']} questions of scenes, %")
        handles, labels = axis.get_legend_handles_labels()
        shown = {n: h for h, n in zip(handles, labels, strict=True) if n != "blank image"}
        figure.legend(shown.values(), shown, loc="outside right upper", frameon=False, fontsize=10)
        figure.savefig(path, metadata={"Date": None})


# ---- files ---------------------------------------------------------------------------------------

DRAWN: dict[str, Callable[[], str]] = {"stages.svg": stages, "architecture.svg": architecture}
"""Drawings that are text, the same on every machine."""


def write(name: str, folder: Path = HERE) -> Path:
    """Draw one picture by its file name.

    Raises:
        ValueError: there is none of that name.
    """
    path = folder / name
    if name in DRAWN:
        path.write_text(DRAWN[name](), "utf-8")
    elif name == "kept.png":
        kept().save(path, optimize=True)
    elif name == "pareto.svg":
        pareto(path)
    else:
        raise ValueError(f"no picture {name}; there are {', '.join(names())}")
    return path


def names() -> Iterator[str]:
    """File names of all pictures."""
    yield from (*DRAWN, "kept.png", "pareto.svg")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or names():
        print(write(wanted))
