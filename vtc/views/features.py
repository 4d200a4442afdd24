# SPDX-License-Identifier: Apache-2.0
"""The view between encoder and LLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .projections import How, Projections, Watched, cached_property

if TYPE_CHECKING:
    from ..budgets import HasBudget
    from ..layouts import CropLayout


@dataclass
class FeaturesView:
    """Between encoder and LLM; B counts images, N the patch tokens that reach this point.

    Views are rectangular: images of different sizes come in views of their own. On models that cut
    an image into crops, the thumbnail and the part of each crop that is not padding are images here
    and share the budget of the image by their patches; ``grid``, ``index`` and ``total`` are of
    that part. A method with ``joint = True`` gets all patches of one image instead (B = 1), in the
    flat order of the model, and `crops` says where they lie. The frames of a video are
    images here too, and share the video's budget by their tokens; a method with ``joint = True``
    gets all of them, and `frame` says which each token lies in.

    Attributes:
        features: (B, N, C) encoder features, no prefix tokens.
        size: (B, N) patches behind each; index: (B, N) patch each stands at in the full grid.
        total: patches of the full grid; grid: (rows, columns).
        scratch: this method's named tensors (B, N, ...).
        crops: layout of the image in a joint view of a model with crops, else None.
        frame: (B, N) frame that each token lies in, in a joint view of a video, else None.
        frames: how many frames the video of a joint view has, else None.
        image: (B,) which of the forward's images each row is of; None where row i is image i.
        images: how many images there are in all views of the forward; None where image is None.
    """

    features: Tensor
    size: Tensor
    index: Tensor
    total: int
    grid: tuple[int, int]
    prefix: int
    has_cls: bool
    projector: Callable[[Tensor], Tensor]
    layers: dict[int, Projections]
    depth: int
    scratch: dict[str, Tensor] = field(default_factory=dict)
    crops: CropLayout | None = None
    frame: Tensor | None = None
    frames: int | None = None
    image: Tensor | None = None
    images: int | None = None
    share: int | None = None  # of the image's budget, where the engine has divided it
    packed: Tensor | None = None  # (B, N, D) where the projector has run already
    arrange: Callable[[Any, How, Callable[[], Tensor]], Tensor] | None = None

    valid: ClassVar[None] = None  # views are rectangular

    @property
    def watched(self) -> Watched:
        read = {"projected features": self.projected} if "projected" in vars(self) else {}
        return {"features": self.features, **read}, None

    @property
    def count(self) -> int:
        """N, the patch tokens now."""
        return self.features.shape[1]

    def budget(self, method: HasBudget) -> int:
        """Tokens the method keeps of each image or crop in this view, at most `count`."""
        share = method.budget(self.total, self.grid) if self.share is None else self.share
        return min(share, self.count)

    @cached_property
    def projected(self) -> Tensor:
        """(B, N, D) features in the space of the LLM."""
        return self.projector(self.features) if self.packed is None else self.packed

    def _layer(self, layer: int) -> Projections:
        return self.layers[layer % self.depth]

    def _patches(self, what: str, layer: int, how: How, compute: Callable[[], Tensor]) -> Tensor:
        """Patch columns of compute() (B, T, ...), folded like the tokens since that layer.

        Where views are parts of what the encoder has seen, the engine arranges them, and keeps
        ``what`` of a layer for the other views.
        """

        def patches() -> Tensor:
            return self._layer(layer).fold(compute(), how)[:, self.prefix :]

        if self.arrange is None:
            return patches()
        return self.arrange((what, layer % self.depth), how, patches)

    def cls_attention(self, layer: int) -> Tensor:
        """(B, H, N) attention of [CLS] to the patches in block ``layer``, softmax over all keys."""
        if not self.has_cls:
            raise UnsupportedError("this encoder has no [CLS] token")

        def row() -> Tensor:
            return self._layer(layer).attention(slice(0, 1))[:, :, 0].transpose(1, 2)

        return self._patches("cls_attention", layer, "sum", row).transpose(1, 2)

    def cls_logits(self, layer: int) -> Tensor:
        """(B, H, N) scores q_cls k / sqrt(d) before the softmax in block ``layer``."""
        if not self.has_cls:
            raise UnsupportedError("this encoder has no [CLS] token")

        def row() -> Tensor:
            return self._layer(layer).logits(slice(0, 1))[:, :, 0].transpose(1, 2)

        return self._patches("cls_logits", layer, "mean", row).transpose(1, 2)

    def cls_similarity(self, layer: int) -> Tensor:
        """(B, N) softmax over all keys of q_cls k / sqrt(C) in block ``layer``, heads as one."""
        if not self.has_cls:
            raise UnsupportedError("this encoder has no [CLS] token")

        def row() -> Tensor:
            heads = self._layer(layer).logits(slice(0, 1))[:, :, 0]  # q k / sqrt(d), C = H d
            return (heads.sum(1) / heads.shape[1] ** 0.5).softmax(-1)

        return self._patches("cls_similarity", layer, "sum", row)

    def attention_received(self, layer: int) -> Tensor:
        """(B, N) attention a patch receives in block ``layer``, mean over heads and query rows.

        Where that block attends within windows (Qwen2.5-VL), in the nearest block that does not:
        windows would all get the same.

        The published substitute for [CLS] attention on towers without one (VisionZip, VisPruner).
        """
        projections = self._layer(layer)
        if projections.whole is not None:
            projections = projections.whole

        def mean() -> Tensor:
            total, lengths = projections.received().mean(1), projections.lengths
            if lengths is None:
                return total / total.shape[1]
            n = torch.tensor(lengths, device=total.device)
            return total / n.repeat_interleave(n)

        return self._patches("attention_received", layer, "sum", mean)

    def key(self, layer: int) -> Tensor:
        """(B, N, H, d) keys of block ``layer``."""
        projections = self._layer(layer)
        return self._patches("key", layer, "mean", lambda: projections.key().transpose(1, 2))
