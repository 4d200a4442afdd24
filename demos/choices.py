# SPDX-License-Identifier: Apache-2.0
"""Choices of the page: models, the methods that work on them, budgets; and their snippet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from torch import nn

from ..benchmarks.shared.budgets import seeded
from ..benchmarks.shared.prompts import prompt_of
from ..errors import UnsupportedError
from ..method import PLACES, Chain, Method
from ..registry import known_methods
from ..session import compressing
from .uploads import MAX_EDGE

ENCODER_STAGES = frozenset({"pixels", "vision", "features"})
MAX_QUESTION = 500
"""Characters."""


@dataclass(frozen=True)
class PageModel:
    """A model of the page.

    Attributes:
        title: what the page calls it.
        knows: a sentence on what it was trained for.
        load: lines of Python that make ``model`` and ``processor``.
    """

    title: str
    net: Any
    processor: Any
    knows: str
    load: str

    def inputs(self, image: Any, question: str) -> Any:
        """Arguments of ``generate`` for one question about one image.

        Raises:
            ValueError: no question, one too long, or one with the image placeholder in it.
        """
        token = getattr(self.processor, "image_token", None) or "<image>"
        if not question.strip():
            raise ValueError("ask a question about the image first")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"the question has {len(question)} characters; {MAX_QUESTION} at most")
        if token in question:
            raise ValueError(f"the question must not contain {token}, which stands for the image")
        prompt = prompt_of(self.processor, question)
        made = self.processor(text=[prompt], images=[image], return_tensors="pt")
        return made.to(self.net.device, self.net.dtype)


def usable(net: nn.Module, stages: frozenset[str] = frozenset(PLACES)) -> dict[str, frozenset[str]]:
    """The methods that `vtc.wrap` takes on a model for images, and the stages each acts in."""
    found = {}
    for name, cls in known_methods().items():
        try:
            method = make([name], 0.5).methods[0]
            if "frames" in cls.needs or not method.stages <= stages:
                continue
            with compressing(net, method):
                found[name] = frozenset[str](method.stages)
        except UnsupportedError:
            continue
    return found


def make(names: Sequence[str], keep: float) -> Chain:
    """The chosen methods as a chain, in the order in which their stages run.

    The last of n methods leaves ``keep`` of the tokens, each before it an equal share of the way
    (``keep ** (i / n)``); those without a budget come as they are.

    Raises:
        ValueError: no method, an unknown one, or a share outside (0, 1].
    """
    if not names:
        raise ValueError("choose at least one method")
    order = list(PLACES)
    plain = [seeded(name, None, 0) for name in dict.fromkeys(names)]
    # What packs the KV cache comes last: nothing can be evicted from a packed one.
    plain.sort(key=lambda m: (m.packs, min(order.index(stage) for stage in m.stages)))
    budgeted = [m.name for m in plain if _takes_budget(m.name)]
    made: list[Method] = []
    for method in plain:
        if method.name in budgeted:
            share = keep ** ((budgeted.index(method.name) + 1) / len(budgeted))
            method = seeded(method.name, Fraction(str(round(share, 4))), 0)
        made.append(method)
    return Chain(tuple(made))


def _takes_budget(name: str) -> bool:
    try:
        seeded(name, Fraction(1, 2), 0)
    except ValueError:  # its own parameters decide
        return False
    return True


SNIPPET = """\
import vtc
from PIL import Image, ImageOps
{imports}
{load}
image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
image.thumbnail(({edge}, {edge}))  # smaller ones stay as they are
# what processor.apply_chat_template makes of the question
prompt = {prompt}
inputs = processor(text=[prompt], images=[image], return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)

vtc.wrap(model, {method})
out = model.generate(**inputs, do_sample=False, max_new_tokens={length})
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(model.vtc.report())
vtc.unwrap(model)
"""


def snippet(model: PageModel, question: str, names: Sequence[str], keep: float, length: int) -> str:
    """A script that does what the page does with these settings; it reads ``image.png``.

    Raises:
        ValueError: as `make`.
    """
    methods = make(names, keep).methods
    if len(methods) == 1:
        shown = ", ".join([f'"{methods[0].name}"', *_parameters(methods[0])])
        imports = []
    else:
        calls = [f"{type(m).__name__}({', '.join(_parameters(m))})" for m in methods]
        shown = f"vtc.chain({', '.join(calls)})"
        imports = [f"from {type(m).__module__} import {type(m).__name__}" for m in methods]
    return SNIPPET.format(
        imports="".join(f"{line}\n" for line in sorted(imports)),
        load=model.load,
        edge=MAX_EDGE,
        prompt=repr(prompt_of(model.processor, question)),
        method=shown,
        length=length,
    )


def _parameters(method: Method) -> list[str]:
    """The hyper-parameters that are not the defaults, as keyword arguments."""
    return [
        f"{f.name}={getattr(method, f.name)!r}"
        for f in fields(method)
        if getattr(method, f.name) != f.default
    ]
