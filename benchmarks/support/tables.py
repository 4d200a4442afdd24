# SPDX-License-Identifier: Apache-2.0
"""The method table and both support matrices, generated from the registry and from runs.

python -m vtc.benchmarks.support.tables    writes them between their markers, in README.md and docs/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import transformers

from ...errors import UnsupportedError
from ...inspection import generic
from ...registry import known_methods, resolve
from ...session import compressing
from ...transformers_contract import SEAMS
from ..shared.budgets import seeded
from ..shared.columns import fill, markdown, words
from ..shared.markdown import fill_block
from ..shared.method_table import method_table
from . import calling_styles, mini_families
from .mini_models import mini_retrieval, mini_tower_config


def seam_table() -> str:
    """What vtc reads of transformers, and what a release that moves one is told, in Markdown."""
    columns = [
        words("where", lambda seam: seam.place),
        words(
            "what is said when it is not there",
            lambda seam: f"has {seam.name.absent(seam.kind)}, read by {seam.reader}",
        ),
    ]
    return markdown(fill(columns, SEAMS))


# ---- support matrix ----------------------------------------------------------------------------


def _pixels(edge: int) -> Any:
    return torch.randn(1, 3, edge, edge, generator=torch.Generator().manual_seed(0))


def _encoder(kind: str) -> tuple[Any, dict[str, Any]]:
    names = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "dinov2": "Dinov2Model"}
    model = mini_families.random_model(names.get(kind, "ViTModel"), mini_tower_config(kind))
    return model, {"pixel_values": _pixels(56)}


def _timm(name: str) -> tuple[Any, dict[str, Any]]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, img_size=112, depth=4, embed_dim=48, num_heads=4)
    return model.eval(), {"x": _pixels(112)}


def _open_clip() -> tuple[Any, dict[str, Any]]:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=4, width=32, head_width=8, patch_size=14, image_size=56)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=4, layers=2)
    return CLIP(32, vision, text).eval(), {"image": _pixels(56)}


def _retrieval(version: str) -> tuple[Any, dict[str, Any]]:
    ids = torch.tensor([[5, 6, 2]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return mini_retrieval(version), {"pixel_values": _pixels(56), **text}


ENCODERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "HF CLIP": lambda: _encoder("clip"),
    "HF SigLIP": lambda: _encoder("siglip"),
    "HF DINOv2": lambda: _encoder("dinov2"),
    "HF ViT": lambda: _encoder("vit"),
    "HF BLIP": lambda: _retrieval("Blip"),
    "HF BLIP-2": lambda: _retrieval("Blip2"),
    "timm ViT": lambda: _timm("vit_small_patch14_dinov2"),
    "timm DeiT": lambda: _timm("deit_tiny_distilled_patch16_224"),
    "timm EVA": lambda: _timm("eva02_tiny_patch14_224"),
    "timm SigLIP": lambda: _timm("vit_base_patch16_siglip_224"),
    "open_clip": _open_clip,
}
"""Encoders alone, each a mini random model and its inputs."""


def _family(name: str) -> tuple[Any, dict[str, Any]]:
    return mini_families.build(name), mini_families.prompt(
        name, [[mini_families.EVERY[name].sizes[0]]]
    )


def _video(name: str) -> tuple[Any, dict[str, Any]]:
    return mini_families.build(name), mini_families.video(name)


def refusal(method: str, model: Any, inputs: dict[str, Any], **parameters: Any) -> str | None:
    """Why a method at half the tokens does not run on a model: its `UnsupportedError`, or None."""
    try:
        made = seeded(method, Fraction(1, 2), 0)
    except ValueError:  # takes no budget
        made = seeded(method, None, 0)
    made = replace(made, **parameters)
    try:
        with torch.no_grad(), compressing(model, made):
            model(**inputs)
    except UnsupportedError as error:
        return str(error)
    return None


def support_matrix() -> str:
    """Method x model in Markdown, found by running each pair; why where one does not run.

    Families whose columns are alike share one.
    """
    reasons: dict[str, int] = {}
    tables = []
    families = {name: partial(_family, name) for name in mini_families.COLUMNS}
    videos = {name: partial(_video, name) for name in mini_families.VIDEOS}
    for title, makers in (("images", families), ("videos", videos), ("encoders alone", ENCODERS)):
        columns: dict[tuple[str, ...], list[str]] = {}
        for name, make in makers.items():
            columns.setdefault(tuple(_column(*make(), reasons)), []).append(name)
        heads = enumerate(map("<br>".join, columns.values()), 1)
        made = [
            words(title, lambda row: f"`{row[0]}`"),
            *(words(head, itemgetter(i), "center") for i, head in heads),
        ]
        tables.append(markdown(fill(made, zip(known_methods(), *columns))))
    return "\n\n".join([*tables, _footnotes(reasons)])


def _column(model: Any, inputs: dict[str, Any], reasons: dict[str, int]) -> Iterator[str]:
    """A mark for each method, by running it."""
    for method, cls in known_methods().items():
        mark, why = "yes", refusal(method, model, inputs)
        if why is not None:
            mark = _number(reasons, generic(why, method))
            ways = (cls.without_cls, cls.outside_encoder, cls.without_cls | cls.outside_encoder)
            for own in filter(None, ways):
                if refusal(method, model, inputs, **own) is None:
                    mark += ", " + ", ".join(f"`{k}={v}`" for k, v in own.items())
                    break
        yield mark


def _number(reasons: dict[str, int], why: str) -> str:
    return str(reasons.setdefault(why, len(reasons) + 1))


def _footnotes(reasons: dict[str, int]) -> str:
    return "\n".join(f"{n}. {why}" for why, n in reasons.items())


def style_matrix() -> str:
    """Calling style x method x family in Markdown: each cell is what `calling_styles.outcome`
    answers.

    "yes" stands for all families; "yes; 2: X" for all but X, where note 2 says why. What holds for
    a family whatever the method stands in the last column. A method that a family refuses in the
    first row is not tried in the others: wrapping it fails.
    """
    reasons: dict[str, int] = {}
    first = next(iter(calling_styles.STYLES))
    names = list(calling_styles.METHODS)
    rows = []
    for style in calling_styles.STYLES:
        found: dict[str, dict[str, str]] = {}
        for family in mini_families.COLUMNS:
            for method in names:
                if style != first and calling_styles.outcome(first, method, family) is not None:
                    continue
                why = calling_styles.outcome(style, method, family)
                mark = "yes" if why is None else _number(reasons, without_names(why, method))
                found.setdefault(family, {})[method] = mark
        whole: dict[str, list[str]] = {}
        every = {mark for marks in found.values() for mark in marks.values()}
        for family, marks in found.items():
            (mark, *others) = set(marks.values())
            if not others and mark != "yes" and len(every) > 1:
                whole.setdefault(mark, []).append(family)
        apart = {family for families in whole.values() for family in families}
        cells = []
        for method in names:
            groups: dict[str, list[str]] = {}
            for family, marks in found.items():
                if family not in apart and method in marks:
                    groups.setdefault(marks[method], []).append(family)
            most = max(groups, key=lambda mark: len(groups[mark]))
            cells.append("; ".join([most, *_listed(groups, most)]))
        rows.append([style, *cells, "; ".join(_listed(whole))])
    heads = (name if name == "chain" else f"`{name}`" for name in names)
    columns = [
        words("calling style", itemgetter(0)),
        *(words(head, itemgetter(i), "center") for i, head in enumerate(heads, 1)),
        words("whatever the method", itemgetter(-1)),
    ]
    return "\n".join([markdown(fill(columns, rows)), "", _footnotes(reasons)])


def said_of(text: str, style: str, method: str, family: str) -> str | None:
    """Entry of one cell in a table of `style_matrix`: None for "yes", else the reason.

    Raises:
        ValueError: it has no such row.
    """
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    if style not in rows:
        raise ValueError(f"no row for {style}")
    cells = [cell.strip() for cell in rows[style].strip("|").split("|")[1:]]
    named = family.replace(", ", " with ")

    def mark_in(cell: str) -> str | None:
        for group in cell.split("; "):
            mark, _, families = group.partition(": ")
            if named in families.split(", "):
                return mark
        return None

    cell = cells[list(calling_styles.METHODS).index(method)]
    mark = mark_in(cells[-1]) or mark_in(cell) or cell.split("; ")[0]
    return None if mark == "yes" else dict(re.findall(r"^(\d+)\. (.*)$", text, re.M))[mark]


def _listed(groups: dict[str, list[str]], most: str = "") -> list[str]:
    """Families by mark, whose own commas would not tell them apart."""
    named = {k: [f.replace(", ", " with ") for f in v] for k, v in groups.items() if k != most}
    return [f"{mark}: {', '.join(families)}" for mark, families in named.items()]


def without_names(why: str, method: str) -> str:
    """A refusal without the names and numbers of one pair."""
    if why.startswith(calling_styles.STOCK):
        return calling_styles.STOCK
    why = re.sub(r"; use methods that act.*", "", why)
    why = re.sub(
        r"^(found|got) .*?: (?=part of)|, and features that were compressed before,", "", why
    )
    why = re.sub(r"prompt of \d+ tokens (.*) window of \d+", r"prompt \1 window", why)
    parts = {m.name for m in resolve(calling_styles.METHODS[method])}
    return re.sub(rf"^({'|'.join(parts)})(?= )", "the method", why)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    fill_block(Path("README.md"), "methods", method_table())
    fill_block(Path("docs/models.md"), "support", support_matrix())
    fill_block(Path("docs/calling-styles.md"), "styles", style_matrix())
    fill_block(Path("docs/releases.md"), "seams", seam_table())
