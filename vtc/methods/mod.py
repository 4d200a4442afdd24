# SPDX-License-Identifier: Apache-2.0
"""VideoLLM-MoD: in some LLM layers only the visual tokens that a router picks are computed.

Wu et al., VideoLLM-MoD: Efficient Video-Language Streaming with Mixture-of-Depths Vision
Computation, NeurIPS 2024, arXiv 2408.16730. In every other layer, for each frame:

    score_j = w . x_j                       w: the router of the layer, trained with the model
    the best 20 % of the visual tokens run attention and MLP; the others keep x_j

Tokens that jump over a layer have no keys and values there and come back behind it. "mod" runs
given routers; it has nothing to offer without. "mod-heuristic" is ours and not the paper's: for the
router it takes the attention of the last prompt token in the layer before, or the token transition
variation of TransPrune. None of the paper's results apply to it.

Departures: the output of a layer is not multiplied by the router's score, so routers trained that
way need their gate folded in; a bias of a router changes no ranking and is ignored. Every other
layer is 1, 3, 5, ... unless the routers or ``layers`` say otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..method import Method, register
from ..reduction import Reduction, gather_tokens
from ..views import DecoderView


class Routers(dict[int, Tensor]):
    """Router weights (D,) by LLM layer."""

    def __repr__(self) -> str:
        return f"<routers of layers {', '.join(map(str, sorted(self)))}>"

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @classmethod
    def read(cls, source: str | os.PathLike[str] | Mapping[Any, Tensor]) -> Routers:
        """Routers from a safetensors file, a state dict, or a mapping of layers to weights.

        The layer is the first whole number in a name, as in "layers.3.router.weight"; biases and
        what is no vector are left out.

        Raises:
            ValueError: no router weights in it, or two for one layer.
        """
        if isinstance(source, str | os.PathLike):
            from safetensors.torch import load_file

            source = load_file(source)
        found = cls()
        for name, weight in source.items():
            number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", str(name))
            vector = weight.dim() == 1 or (weight.dim() == 2 and weight.shape[0] == 1)
            if number is None or not vector or str(name).endswith("bias"):
                continue
            layer = int(number[1])
            if layer in found:
                raise ValueError(f"two router weights for layer {layer}, the second is {name!r}")
            found[layer] = weight.detach().flatten().float()
        if not found:
            raise ValueError(
                'no router weights found; expected {layer: (D,)} or names like "layers.3.weight"'
            )
        return found


def best_of_each_image(score: Tensor, image: Tensor, keep: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N) bool, the ``keep[b, i]`` tokens with the highest score of image i of row b.

    Args:
        score: (B, N); image: (B, N) ordinals; keep: (B, I); valid: (B, N) bool or None.
    """
    n = score.shape[1]
    if valid is not None:
        image = image.where(valid, keep.shape[1])  # behind all images
    order = score.float().argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, image.gather(1, order).argsort(dim=1, stable=True))
    sorted_image = image.gather(1, order)
    place = torch.arange(n, device=score.device).expand_as(order)
    first = place.where(sorted_image != sorted_image.roll(1, 1), 0)
    first[:, 0] = 0
    rank = place - first.cummax(1).values
    limit = torch.nn.functional.pad(keep, (0, 1)).gather(1, sorted_image)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, rank < limit)


@dataclass(frozen=True, kw_only=True)
class Depths(Method):
    """Base of both: a score in front of some layers decides who enters them."""

    layers: tuple[int, ...] | None = None

    default_ratio = 0.2
    bypass = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if not all(isinstance(i, int) and i >= 0 for i in self.layers) or not self.layers:
                raise ValueError(f"layers are 0-based LLM layers; got {self.layers}")

    def bypass_layers(self, depth: int) -> Iterable[int]:
        layers = tuple(range(1, depth, 2)) if self.layers is None else self.layers
        if max(layers) >= depth:
            raise UnsupportedError(
                f"{self.name} acts in LLM layer {max(layers)} and there are {depth}; choose others"
            )
        return layers

    def score(self, v: DecoderView) -> Tensor:
        """(B, N) how much each visual token needs layer ``v.layer + 1``."""
        raise NotImplementedError

    def on_bypass(self, v: DecoderView) -> Reduction | None:
        if v.within_budget(self):
            return None
        most = max(map(len, v.images))
        keep = [[self.budget(n) for n in row] + [0] * (most - len(row)) for row in v.images]
        budgets = torch.tensor(keep, device=v.hidden.device)
        chosen = best_of_each_image(self.score(v), v.image, budgets, v.valid)
        return Reduction.from_scores(chosen.float(), v.budget(self), v.valid)


@register
@dataclass(frozen=True, kw_only=True)
class MoD(Depths):
    """Mixture of depths with trained routers.

    Args:
        routers: weights (D,) or (1, D) by LLM layer, a state dict with such names, or the path of a
            safetensors file.
        layers: those to use; all that have a router when None.
    """

    routers: Any = None

    name = "mod"
    summary = "Skips LLM layers for the tokens that given, trained routers leave out (VideoLLM-MoD)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routers is not None and not isinstance(self.routers, Routers):
            object.__setattr__(self, "routers", Routers.read(self.routers))
        if self.routers is not None and self.layers is not None:
            missing = sorted(set(self.layers) - set(self.routers))
            if missing:
                raise ValueError(f"no router for layers {missing}; there are {self.routers!r}")

    @property
    def has_budget(self) -> bool:
        return self.routers is not None  # nothing runs without

    def bypass_layers(self, depth: int) -> Iterable[int]:
        if self.routers is None:
            raise UnsupportedError(
                "mod runs routers that were trained with the model and none were given: pass "
                'routers={layer: (D,) weights} or a safetensors file; "mod-heuristic" needs none '
                "but is not the paper's method"
            )
        layers = tuple(sorted(self.routers)) if self.layers is None else self.layers
        if max(layers) >= depth:
            raise UnsupportedError(f"{self.routers!r} do not fit a model of {depth} layers")
        return layers

    def score(self, v: DecoderView) -> Tensor:
        router = self.routers[v.layer + 1].to(v.hidden.device)
        if len(router) != v.hidden.shape[2]:
            raise ValueError(
                f"the router of layer {v.layer + 1} has {len(router)} weights, the model "
                f"{v.hidden.shape[2]} dimensions"
            )
        return v.tokens.float() @ router


@register
@dataclass(frozen=True, kw_only=True)
class HeuristicMoD(Depths):
    """Mixture of depths without training; our substitute for routers, not the paper's.

    Args:
        router: "attention", of the last prompt token in the layer before, or "ttv", the token
            transition variation there.
        layers: whose input is routed; 1, 3, 5, ... when None. No two in a row.
    """

    router: Literal["attention", "ttv"] = "attention"

    name = "mod-heuristic"
    summary = "Skips every other LLM layer for little-attended tokens (ours, after VideoLLM-MoD)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router not in ("attention", "ttv"):
            raise ValueError(f'router is "attention" or "ttv"; got {self.router!r}')
        used = set(self.layers or ())
        if 0 in used or any(i + 1 in used for i in used):
            raise ValueError(
                "the heuristic reads the layer before, which all tokens must have entered: leave "
                f"out layer 0 and neighbours; got {self.layers}"
            )
        if self.router == "ttv":
            object.__setattr__(self, "needs", frozenset({"sublayers"}))

    def score(self, v: DecoderView) -> Tensor:
        if self.router == "attention":
            return v.attention("last")[:, :, 0].mean(1)
        from .transprune import transition

        tokens = v.text | v.visual
        change = transition(v.attention_input, v.attention_output, tokens)
        change = change + transition(v.mlp_input, v.mlp_output, tokens)
        return gather_tokens(change, v.visual_index)
