# SPDX-License-Identifier: Apache-2.0
"""CDPruner: a diverse subset of the visual tokens, conditioned on the question.

Zhang et al., Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs, NeurIPS 2025, arXiv 2506.10967. A determinantal point process over the projected features x:

    r_i  = min-max over the image of -cos(p_i, t)
    L_ij = r_i cos(x_i, x_j) r_j
    keep the K tokens that maximise det L_S, greedily (Chen et al., NeurIPS 2018)

p_i is patch i in the space of CLIP (final norm and visual projection of the tower on the features
the LLM gets) and t the question from CLIP's text tower, the mean over pieces of the length it
takes. The minus sign is the paper's: similarities of CLIP's patches to a text are inverted.

The text tower is part of no LLaVA checkpoint, so it must be given:

    question = "What is left of the red square?"
    method = CDPruner.for_prompts(clip, tokenizer, question, keep_tokens=64)
    with vtc.compressing(model, method): ...

``relevance="none"`` takes r = 1, the plain process on cosines. That is a variant without the
question, not the published method.

Departures: min-max is taken over each image, where the published code takes it over the batch,
which couples its samples; an image of equally relevant patches has r = 1; once det L_S cannot grow
within the precision of fp32, tokens follow by falling relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..hyperparameters import check_choice, waive
from ..method import Method
from ..reduction import Reduction, gather_tokens
from ..registry import known_methods, register
from ..views.features import FeaturesView
from ._common import unit
from ._text import TextQuery, clip_projection, embed_text

if TYPE_CHECKING:
    from ..adapters.base import Sites

RESIDUAL = 1e-5
"""Share of a token's own L_ii below which fp32 cannot tell what the chosen ones leave of it."""


def greedy_map(x: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Greedy maximisation of det L_S, one row and column of its Cholesky factor for each choice.

    Args:
        x: (B, N, C); relevance: (B, N), not negative.
        k: tokens to choose.

    Returns:
        The choices in order (B, k) int64, ties to the first, and the factor by which each of them
        multiplies the determinant (B, k).
    """
    relevance = relevance.float()
    x = unit(x) * relevance[..., None]
    own = relevance.square()  # exactly L_ii, so that equal ones tie whatever the batch
    left = own  # of each token, its squared distance to the span of the chosen ones
    factor = x.new_zeros(len(x), k, x.shape[1])
    taken = torch.zeros_like(own, dtype=torch.bool)
    floor = -1 - own.amax(1, keepdim=True)  # all that is left comes behind every real gain
    order, gains = [], []
    for i in range(k):
        gain = left.where(left > RESIDUAL * own, own + floor).masked_fill(taken, -torch.inf)
        best = gain.argmax(1, keepdim=True)
        pivot = left.gather(1, best)
        order.append(best)
        gains.append(pivot)
        taken = taken.scatter(1, best, True)
        row = (x @ gather_tokens(x, best).mT)[..., 0]  # of the kernel, which would be N x N
        done = factor[:, :i]
        mine = done.gather(2, best[:, None].expand(-1, i, -1))
        row = row - (mine.mT @ done)[:, 0]
        row = (row / pivot.clamp(min=1e-12).sqrt()).where(pivot > RESIDUAL * own.gather(1, best), 0)
        factor[:, i] = row
        left = (left - row.square()).clamp(min=0)
    return torch.cat(order, 1), torch.cat(gains, 1)


@register
@dataclass(frozen=True, kw_only=True)
class CDPruner(Method):
    """Keep visual tokens that are relevant to the question and unlike each other.

    Args:
        relevance: "text", by ``text``, or "none", all tokens alike.
        text: what to compare patches with; `for_prompts` makes it.
        inverted: patches unlike the text are the relevant ones, as in CLIP; False for towers whose
            patches are trained to be like it.
    """

    relevance: Literal["text", "none"] = "text"
    text: TextQuery | None = None
    inverted: bool = True

    name = "cdpruner"
    summary = "Keeps a subset that is diverse given the question, by a DPP (CDPruner, NeurIPS 2025)"
    default_ratio = 0.111
    needs = frozenset({"text"})
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"keep_tokens": tokens} for tokens in (32, 64, 128)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "relevance", ("text", "none"))
        if self.text is not None and not isinstance(self.text, TextQuery):
            raise ValueError(
                f"text is a TextQuery, as CDPruner.for_prompts makes it; got {type(self.text)}"
            )
        if self.relevance == "none" and self.text is not None:
            raise ValueError('relevance="none" uses no text; leave one of the two out')
        if self.relevance == "none" and self.inverted is not True:
            raise ValueError('relevance="none" compares with no text; leave inverted out')
        if self.relevance == "none" or self.text is not None:
            waive(self, "text")

    @classmethod
    def for_prompts(
        cls,
        clip: Any,
        tokenizer: Any,
        prompts: str | Sequence[str] | Callable[[], str | Sequence[str]],
        project: Callable[[Tensor], Tensor] | None = None,
        **parameters: Any,
    ) -> CDPruner:
        """The method for one question, or for one question about each image of the batch.

        Args:
            clip: a CLIPModel of transformers on the vision tower of the wrapped model, such as
                openai/clip-vit-large-patch14-336 for LLaVA-1.5; with ``project`` its text tower
                (CLIPTextModelWithProjection) is enough.
            tokenizer: of that model.
            prompts: questions, one or as many as images; or a function that gives them, called at
                each forward.
            project: encoder features (B, N, C) to the space of the text (B, N, P); by default
                CLIP's final norm and visual projection.
            parameters: of the method, such as ``keep_tokens=64``.

        Raises:
            UnsupportedError: no projection for the patches in ``clip``, and none given.
        """
        project = clip_projection(clip) if project is None else project
        embedding: Any
        if callable(prompts):
            ask, label = prompts, "asked at each forward"

            def embedding() -> Tensor:
                return embed_text(clip, tokenizer, ask())
        else:
            embedding = embed_text(clip, tokenizer, prompts)
            label = prompts if isinstance(prompts, str) else f"{len(prompts)} prompts"
        return cls(text=TextQuery(embedding, project, label), **parameters)

    def check(self, sites: Sites) -> None:
        if "text" in self.needs:
            usable = [
                name
                for name, cls in known_methods().items()
                if "text" not in cls.needs and cls().stages == {"features"}
            ]
            raise UnsupportedError(
                "cdpruner needs the text of the question in the space of CLIP, which the model "
                "does not have: make it by CDPruner.for_prompts(clip, tokenizer, prompts), or give "
                'relevance="none" for its variant without text; methods that do without: '
                + ", ".join(usable)
            )

    def relevances(self, v: FeaturesView) -> Tensor:
        """(B, N) in [0, 1], min-max over each image."""
        if self.text is None:
            return torch.ones(v.features.shape[:2], device=v.features.device)
        r = self.text.similarity(v) * (-1 if self.inverted else 1)
        low, high = r.amin(1, keepdim=True), r.amax(1, keepdim=True)
        return torch.where(high > low, (r - low) / (high - low).clamp(min=1e-12), 1.0)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        if k >= v.count:
            return None
        order, _ = greedy_map(v.projected, self.relevances(v), k)
        return Reduction.from_keep(order.sort(1).values, v.count)
