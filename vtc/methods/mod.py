# SPDX-License-Identifier: Apache-2.0
"""VideoLLM-MoD: in some LLM layers only the visual tokens that a router picks are computed.

Wu et al., VideoLLM-MoD: Efficient Video-Language Streaming with Mixture-of-Depths Vision
Computation, NeurIPS 2024, arXiv 2408.16730. In every other layer, for each frame:

    score_j = w . x_j                       w: the router of the layer, trained with the model
    the best 20 % of the visual tokens run attention and MLP; the others keep x_j

Tokens that bypass a layer have no keys and values there and come back behind it. "mod" runs
given routers; it has nothing to offer without. "mod-heuristic" is ours and not the paper's: for the
router it takes the attention of the last prompt token in the layer before, or the token transition
variation of TransPrune. None of the paper's results apply to it.

Departures: the output of a layer is not multiplied by the router's score, so routers trained that
way need their gate folded in; a bias of a router changes no ranking and is ignored. Every other
layer is 1, 3, 5, ... unless the routers or ``layers`` say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..hyperparameters import check_choice, require, waive
from ..method import Method
from ..reduction import Reduction, gather_tokens
from ..registry import register
from ..views.decoder import DecoderView
from ._common import attended, best_of_each
from ._routers import Routers


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
        if not layers:
            raise UnsupportedError(
                f"{self.name} acts in every second LLM layer from 1 on, and the language model has "
                f"{depth}; use a method that acts in front of it, such as divprune"
            )
        if max(layers) >= depth:
            raise UnsupportedError(
                f"{self.name} acts in LLM layer {max(layers)} and there are {depth}; choose others"
            )
        return layers

    def score(self, v: DecoderView) -> Tensor:
        """(B, N) how much each visual token needs layer ``v.layer + 1``."""
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def on_bypass(self, v: DecoderView) -> Reduction | None:
        if v.within_budget(self):
            return None
        most = max(map(len, v.images))
        keep = [[self.budget(n) for n in row] + [0] * (most - len(row)) for row in v.images]
        budgets = torch.tensor(keep, device=v.hidden.device)
        chosen = best_of_each(self.score(v), v.image, budgets, v.valid)
        return Reduction.from_scores(chosen, v.budget(self), v.valid)


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
    needs = frozenset({"routers"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routers is None:
            return
        if not isinstance(self.routers, Routers):
            object.__setattr__(self, "routers", Routers.read(self.routers))
        waive(self, "routers")
        if self.layers is not None:
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
        check_choice(self, "router", ("attention", "ttv"))
        used = set(self.layers or ())
        if 0 in used or any(i + 1 in used for i in used):
            raise ValueError(
                "the heuristic reads the layer before, which all tokens must have entered: leave "
                f"out layer 0 and neighbours; got {self.layers}"
            )
        if self.router == "ttv":
            require(self, "sublayers")

    def score(self, v: DecoderView) -> Tensor:
        if self.router == "attention":
            return attended(v, "last")
        from .transprune import transition

        tokens = v.text | v.visual
        change = transition(v.attention_input, v.attention_output, tokens)
        change = change + transition(v.mlp_input, v.mlp_output, tokens)
        return gather_tokens(change, v.visual_index)
