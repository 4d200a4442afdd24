# SPDX-License-Identifier: Apache-2.0
"""Not-a-number and overflow are reported, never ranked.

Every comparison with NaN is false and torch sorts NaN first, so a method would choose tokens all
the same, and the answer would read well. What each method chose among is looked at, and what it
ranked by. On a GPU a look that is waited for costs time: so each only leaves a flag on the device,
and the flags are read together, once the images are encoded and once the prompt is through the LLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache.codecs import Packing
from ..errors import NotFiniteError
from ..hooks.per_thread import PerThread, Threaded
from ..method import split_answer

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


class About(NamedTuple):
    """What was looked at: of which method ("" for none), in which stage and layer."""

    method: str
    stage: str
    layer: int | None
    what: str


class Flag(NamedTuple):
    """One look: (B,) bool, rows that are broken; (B,) images in them, None where they are these."""

    about: About
    rows: Tensor
    image: Tensor | None

    def numbers(self) -> list[int]:
        """The images or prompts that are broken."""
        rows = self.rows.nonzero()[:, 0]
        return (rows if self.image is None else self.image[rows.to(self.image.device)]).tolist()


class Finite(Threaded):
    """What the methods of one engine saw in this forward; empty under `torch.compile`."""

    flags: PerThread[list[Flag]] = PerThread(list)

    def __init__(self, kind: str) -> None:
        """
        Args:
            kind: what a row of the views is, for the message.
        """
        self.kind = kind

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

    def look_at_projected(
        self, x: Tensor, real: Tensor | None = None, image: Tensor | None = None
    ) -> None:
        """Read all flags, and whether features x (B, K, D) for the LLM are numbers.

        There a NaN would mean that the token was dropped.

        Args:
            real: (B, K) bool, the tokens that count; image: (B,) as in `Flag`.

        Raises:
            NotFiniteError: they are not.
        """
        if not _untouchable():
            about = About("", "features", None, "projected features")
            self.flags.append(Flag(about, broken(x.detach(), real), image))
            self.check()

    def _look(self, view: Any, answer: Any, name: str, stage: str, layer: int | None) -> None:
        """Leave flags for what a method chose among, what it made and the scores it tells."""
        parts, real = view.watched
        looks = [(what, x, real) for what, x in parts.items()]
        scores = None
        if isinstance(answer, Packing):
            scores = answer.rank
        elif answer is not None:
            reduction, tokens = split_answer(answer)
            assert reduction is not None
            scores = reduction.scores
            if tokens is not None:
                looks.append(("new tokens", tokens, reduction.valid))
        found = {what: broken(x.detach(), counts) for what, x, counts in looks}
        if scores is not None:  # infinite where a method keeps or leaves tokens in any case
            bad = scores.isnan()
            bad = bad if view.valid is None else bad & view.valid[:, -bad.shape[1] :].to(bad.device)
            found["scores"] = bad.any(1)
        image = getattr(view, "image", None) if stage == "features" else None
        for what, rows in found.items():
            self.flags.append(Flag(About(name, stage, layer, what), rows, image))

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
        method, stage, layer, what = about = next(f.about for f in flags if f.numbers())
        # Images of different sizes come in views of their own.
        rows = tuple(sorted({i for f in flags if f.about == about for i in f.numbers()}))
        raise NotFiniteError(
            (f"{method}: " if method else "")
            + f"the {what} {WHERE[stage].format(layer=layer)} are not a number or overflow, in "
            f"{self.kind} {', '.join(map(str, rows))} (from 0): corrupt pixels, a broken "
            "checkpoint, or an overflow in the model (try bfloat16 or float32)",
            *(method, stage, layer, rows),
        )


def _untouchable() -> bool:
    """Whether nothing may be read back here: a graph is being compiled or captured."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
