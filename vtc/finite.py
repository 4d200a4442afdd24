# SPDX-License-Identifier: Apache-2.0
"""Not-a-number and overflow are reported, never ranked.

Every comparison with NaN is false and torch sorts NaN first, so a method would choose tokens all
the same, and the answer would read well. What each method chose among is looked at, and what it
ranked by. On a GPU a look that is waited for costs time: so each only leaves a flag on the device,
and the flags are read together, once the images are encoded and once the prompt is through the LLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import NotFiniteError
from .method import split_answer
from .quantized import Packing

WHERE = {
    "vision": "in encoder block {layer}",
    "features": "between encoder and LLM",
    "decoder": "behind LLM layer {layer}",
    "bypass": "behind LLM layer {layer}",
    "cache": "in the KV cache of LLM layer {layer}",
}


def broken(x: Tensor, real: Tensor | None = None) -> Tensor:
    """(B,) bool, rows of x (B, T, ...) with a token whose norm is NaN, or infinite in fp32.

    A norm above 1.8e19 is infinite: cosines of such tokens would all be 0.

    Args:
        real: (B, T) bool, the tokens that count; all when None.
    """
    dims, dtype = tuple(range(2, x.dim())), torch.promote_types(x.dtype, torch.float32)
    bad = ~torch.linalg.vector_norm(x, dim=dims, dtype=dtype).isfinite()
    return (bad if real is None else bad & real.to(bad.device)).any(1)


@dataclass
class Flag:
    """One look: (B,) bool, rows that are broken, and what to say of them."""

    rows: Tensor
    method: str
    stage: str
    layer: int | None
    what: str
    numbers: Tensor | None  # of the images in the rows, where they are not the rows themselves


@dataclass
class Finite:
    """What the methods of one engine saw in this forward; empty under `torch.compile`.

    Attributes:
        kind: what a row of the views is, for the message.
    """

    kind: str
    flags: list[Flag] = field(default_factory=list)

    def ask(
        self, hook: Callable[[Any], Any], view: Any, name: str, stage: str, layer: Any = None
    ) -> Any:
        """What a hook of method ``name`` answers to a view, looked at unless it is None.

        Raises:
            NotFiniteError: the hook failed, and because of this.
        """
        if _untouchable():
            return hook(view)
        try:
            answer = hook(view)
        except Exception as error:
            self._look(view, None, name, stage, layer)
            try:
                self.check()
            except NotFiniteError as reason:
                raise reason from error
            raise
        if answer is not None:
            self._look(view, answer, name, stage, layer)
        return answer

    def look(
        self,
        x: Tensor,
        what: str,
        real: Tensor | None = None,
        method: str = "",
        stage: str = "features",
        layer: int | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        """Leave a flag for tokens x (B, T, ...); see `broken` and `Flag`."""
        if not _untouchable():
            rows = broken(x.detach(), real)
            self.flags.append(Flag(rows, method, stage, layer, what, numbers))

    def _look(self, view: Any, answer: Any, name: str, stage: str, layer: int | None) -> None:
        """Leave flags for what a method chose among, and for the scores it tells."""
        numbers = getattr(view, "image", None) if stage == "features" else None
        where = (name, stage, layer)
        parts, real = view.watched
        for what, x in parts.items():
            self.look(x, what, real, *where, numbers)
        if answer is None:
            return
        if isinstance(answer, Packing):
            scores = answer.rank
        else:
            reduction, tokens = split_answer(answer)
            scores = reduction.scores  # type: ignore[union-attr]
            if tokens is not None:
                self.look(tokens, "new tokens", reduction.valid, *where, numbers)  # type: ignore[union-attr]
        if scores is not None:  # infinite where a method keeps or leaves tokens in any case
            bad = scores.isnan()
            bad = bad if view.valid is None else bad & view.valid[:, -bad.shape[1] :].to(bad.device)
            self.flags.append(Flag(bad.any(1), *where, "scores", numbers))

    def check(self) -> None:
        """Read the flags, all at once, and forget them.

        Raises:
            NotFiniteError: the first of them that is set.
        """
        if not self.flags:
            return
        flags, self.flags = self.flags, []
        device = flags[0].rows.device
        if not bool(torch.stack([f.rows.any().to(device) for f in flags]).any()):
            return
        first = next(f for f in flags if bool(f.rows.any()))
        rows = first.rows.nonzero()[:, 0]
        rows = rows if first.numbers is None else first.numbers[rows.to(first.numbers.device)]
        numbers = tuple(sorted(set(rows.tolist())))
        some = ", ".join(map(str, numbers))
        place = WHERE[first.stage].format(layer=first.layer)
        who = f"{first.method}: " if first.method else ""
        raise NotFiniteError(
            f"{who}the {first.what} {place} are not a number or overflow, in {self.kind} {some} "
            f"(from 0): corrupt pixels, a broken checkpoint, or an overflow in the model (try "
            "bfloat16 or float32)",
            first.method,
            first.stage,
            first.layer,
            numbers,
        )


def _untouchable() -> bool:
    """Whether nothing may be read back here: a graph is being compiled or captured."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
