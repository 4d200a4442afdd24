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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..method import Method, known_methods, register
from ..reduction import Reduction
from ..views import FeaturesView
from .tome import unit

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
    kernel = x @ x.transpose(1, 2)
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
        at = best[:, :, None]
        row = kernel.gather(1, at.expand(-1, -1, x.shape[1]))[:, 0]
        mine = factor.gather(2, at.expand(-1, k, -1))
        row = row - (factor * mine).sum(1)
        row = (row / pivot.clamp(min=1e-12).sqrt()).where(pivot > RESIDUAL * own.gather(1, best), 0)
        factor[:, i] = row
        left = (left - row.square()).clamp(min=0)
    return torch.cat(order, 1), torch.cat(gains, 1)


@dataclass(frozen=True, eq=False)
class TextQuery:
    """What the prompts ask for, in a space that patches can be compared in.

    Attributes:
        embedding: (1, P), the same for every image, or (B, P) for the B images of a forward; or a
            function that gives it, called at each forward.
        project: encoder features (B, N, C) to (B, N, P).
        label: what reports show.
    """

    embedding: Tensor | Callable[[], Tensor] = field(repr=False)
    project: Callable[[Tensor], Tensor] = field(repr=False)
    label: str = "given"

    def similarity(self, v: FeaturesView) -> Tensor:
        """(B, N) cosine of every patch to the text of its image.

        Raises:
            ValueError: as many texts as neither one nor the images.
        """
        text = self.embedding() if callable(self.embedding) else self.embedding
        if text.dim() != 2 or len(text) not in (1, len(v.features)):
            raise ValueError(
                f"the text embedding has shape {tuple(text.shape)} and there are {len(v.features)} "
                "images; give (1, P) for one prompt about all, or one row for each image"
            )
        patches = unit(self.project(v.features)).to(v.features.device)
        return (patches * unit(text).to(patches.device)[:, None]).sum(2)


@torch.no_grad()
def embed_text(clip: Any, tokenizer: Any, prompts: str | Sequence[str]) -> Tensor:
    """(prompts, P) embeddings by CLIP's text tower, the mean over pieces of the length it takes."""
    config = getattr(clip.config, "text_config", clip.config)
    room = config.max_position_embeddings - 2
    device = clip.text_projection.weight.device
    out = []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        pieces = [ids[i : i + room] for i in range(0, max(len(ids), 1), room)]
        embedded = []
        for piece in pieces:
            row = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
            pooled = clip.text_model(input_ids=torch.tensor([row], device=device)).pooler_output
            embedded.append(clip.text_projection(pooled))
        out.append(torch.cat(embedded).mean(0))
    return torch.stack(out)


def clip_projection(clip: Any) -> Callable[[Tensor], Tensor]:
    """Final norm and visual projection of a CLIP model, for patches as for its class token."""
    vision = getattr(clip, "vision_model", None)
    if vision is None or getattr(clip, "visual_projection", None) is None:
        raise UnsupportedError(
            f"{type(clip).__name__} has no vision tower and visual projection to compare patches "
            "with; give a CLIPModel, or project=, a function of features (B, N, C) to (B, N, P)"
        )
    weight = clip.visual_projection.weight

    @torch.no_grad()
    def project(features: Tensor) -> Tensor:
        x = features.to(weight.device, weight.dtype)
        return clip.visual_projection(vision.post_layernorm(x))

    return project


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
        if self.relevance not in ("text", "none"):
            raise ValueError(f'relevance is "text" or "none"; got {self.relevance!r}')
        if self.text is not None and not isinstance(self.text, TextQuery):
            raise ValueError(
                f"text is a TextQuery, as CDPruner.for_prompts makes it; got {type(self.text)}"
            )
        if self.relevance == "none" and self.text is not None:
            raise ValueError('relevance="none" uses no text; leave one of the two out')
        if self.relevance == "none" or self.text is not None:
            object.__setattr__(self, "needs", frozenset())

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
