# SPDX-License-Identifier: Apache-2.0
"""Views and runs for methods that act in two places."""

from __future__ import annotations

import functools
from typing import Any

import mini_llava as mini
import pytest
import torch
from torch import Tensor

import vtc
from vtc.transformers_contract import cache_left
from vtc.views.features import FeaturesView
from vtc.views.projections import Projections


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def random_tokens(batch: int, n: int, seed: int = 0, width: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, width, generator=g), torch.rand(batch, n, generator=g)


def features_view(
    batch: int = 2, grid: tuple[int, int] = (6, 8), seed: int = 0, depth: int = 6, cls: bool = True
) -> FeaturesView:
    total, heads = grid[0] * grid[1], 4
    g = torch.Generator().manual_seed(seed)

    def layer() -> Projections:
        q, k = torch.randn(2, batch, heads, total + cls, 8, generator=g)
        return Projections(lambda rows: q[:, :, rows], lambda: k, 8**-0.5)

    return FeaturesView(
        features=torch.randn(batch, total, 32, generator=g),
        size=torch.ones(batch, total),
        index=torch.arange(total).expand(batch, total),
        total=total,
        grid=grid,
        prefix=int(cls),
        has_cls=cls,
        projector=lambda x: x[..., :16] * 2 + 1,
        layers={i: layer() for i in range(depth)},
        depth=depth,
    )


@functools.cache
def stock(pad: str | None = None, images: tuple[int, ...] = (1, 1)) -> dict[str, Any]:
    """Maps and features of the uncompressed mini LLaVA, on inputs with rows of one image each."""
    model = mini.build(attention="eager")
    inputs = mini.prompt(list(images), pad=pad)
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    tower = model.model.vision_tower(
        inputs["pixel_values"], output_attentions=True, output_hidden_states=True
    )
    features = tower.hidden_states[-2][:, 1:]
    return {
        "inputs": inputs,
        "llm": out.attentions,
        "hidden": out.hidden_states,
        "cls": [a[:, :, 0, 1:].mean(1) for a in tower.attentions],
        "features": features,
        "projected": model.model.multi_modal_projector(features),
        "visual": inputs["input_ids"] == mini.IMAGE,
    }


def kept_by(method: Any, pad: str | None = None, images: tuple[int, ...] = (1, 1)) -> list:
    model = mini.build()
    vtc.wrap(model, method)
    model(**stock(pad, images)["inputs"])
    return [k.tolist() for k in model.vtc.report().kept]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() @ b.double()) / (a.double().norm() * b.double().norm()))


CASES: dict[str, tuple[str | None, tuple[int, ...]]] = {
    "batch": (None, (1, 1)),
    "left": ("left", (1, 2, 1)),
    "right": ("right", (1, 1, 2)),
}


def prefill_and_steps(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, list]:
    out = model(**inputs, use_cache=True)
    lengths = [layer.keys.shape[2] for layer in cache_left(out).layers]
    steps = None
    if bool(inputs["attention_mask"][:, -1].all()):
        made = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        steps = torch.stack(made.logits, 1)
    return out.logits, steps, lengths
