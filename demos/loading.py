# SPDX-License-Identifier: Apache-2.0
"""The models of the page: the embedded ones, or any other by folder or hub id."""

from __future__ import annotations

from typing import Any

import torch

from ..benchmarks.tiny import models
from .choices import PageModel

EMBEDDED = {
    "load_llava": (
        "tiny LLaVA",
        "scenes of coloured shapes with digits, and the plain shapes of easy-VQA",
    ),
    "load_llava_next": ("tiny LLaVA-NeXT", "small numbered signs, seen in crops"),
}
CAUTION = (
    "The embedded models are laboratory animals with about 190 words. They know nothing but these "
    "tasks: on photographs, documents and charts expect nonsense. Another model: vtc demo --model "
    "FOLDER_OR_HUB_ID"
)


def embedded(device: str = "cpu") -> list[PageModel]:
    """The tiny LLaVA and the tiny LLaVA-NeXT."""
    made = []
    for loader, (title, knows) in EMBEDDED.items():
        net, processor = getattr(models, loader)(device)
        place = "" if device == "cpu" else f'"{device}"'
        load = (
            f"from vtc.benchmarks.tiny.models import {loader}\n\n"
            f"model, processor = {loader}({place})"
        )
        made.append(PageModel(title, net, processor, knows, load))
    return made


def other(name: str, device: str, dtype: str, trust_remote_code: bool = False) -> PageModel:
    """A model by folder or hub id, from safetensors alone: nothing pickled is read.

    Args:
        trust_remote_code: run Python files of the checkpoint. Off, one that needs them is refused.

    Raises:
        OSError, ValueError: it cannot be had, needs code of its own, or has no safetensors.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    processor = AutoProcessor.from_pretrained(name, **trust)
    net = AutoModelForImageTextToText.from_pretrained(
        name, dtype=getattr(torch, dtype), use_safetensors=True, **trust
    )
    own = ", trust_remote_code=True" if trust_remote_code else ""
    load = (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f"processor = AutoProcessor.from_pretrained({name!r}{own})\n"
        f"model = AutoModelForImageTextToText.from_pretrained({name!r}, dtype={dtype!r}{own})\n"
        f"model = model.to({device!r}).eval()"
    )
    title = name.rstrip("/").rsplit("/", 1)[-1]
    return PageModel(title, net.to(device).eval(), processor, "", load)
