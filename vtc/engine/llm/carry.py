# SPDX-License-Identifier: Apache-2.0
"""Arrival in front of the LLM: the image features that are left, and notes taken on them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NotFiniteError, UnsupportedError
from ...reduction import Reduction, gather_tokens
from ...views.decoder import DecoderView
from ..handoff import Notes
from .forward import Forward


def features_left(st: Forward, view: DecoderView, each: int | None) -> Reduction | None:
    """The visual tokens whose features are not marked as dropped, by NaN; None where none is.

    Args:
        each: under torch.compile, how many the encoder has left of every image, None for all.

    Raises:
        NotFiniteError: nothing is left of an image.
    """
    alive = ~gather_tokens(view.hidden[..., 0].isnan(), view.visual_index)
    if view.valid is not None:
        alive &= view.valid
    if torch.compiler.is_compiling() and st.count is not None:
        left = _as_many(alive, view.count if each is None else each * len(st.images[0]))
    else:
        _check_images(st, view, alive)
        left = Reduction.from_mask(alive)
    whole = left.valid is None and view.valid is None and left.count == view.count
    return None if whole else left


def _as_many(alive: Tensor, k: int) -> Reduction:  # pragma: no cover (traced)
    torch._assert_async(
        (alive.sum(1) == k).all(),
        "torch.compile: images kept different numbers of tokens, or their features are not a "
        "number",
    )
    keep = alive.long().argsort(dim=1, descending=True, stable=True)[:, :k]
    return Reduction.from_keep(keep, alive.shape[1])


def _check_images(st: Forward, view: DecoderView, alive: Tensor) -> None:
    """Every image must have tokens left: all NaN is no sentinel but a broken image."""
    images = max(map(len, st.images))
    left = torch.zeros(alive.shape[0], images, device=alive.device)
    left.scatter_add_(1, view.image.clamp(min=0), alive.float())
    for r, row in enumerate(st.images):
        if not bool(left[r, : len(row)].all()):
            raise NotFiniteError(
                f"the features of an image in row {r} are not a number: corrupt pixels, or an "
                "overflow in the encoder (try bfloat16 or float32)",
                *("", "features", None, (r,)),
            )


def take_notes(st: Forward, view: DecoderView, handed: Notes) -> None:
    """Bring what methods noted on image features to the rows those features went to.

    Images are recognised by their first surviving feature, which arrives here unchanged, so the
    order of encoding, beams and features encoded long before need no bookkeeping.

    Raises:
        UnsupportedError: features came from an encoder call before the last one.
    """
    hidden = view.hidden
    if torch.compiler.is_compiling() and st.count is not None:  # encoded in placeholder order
        batch = hidden.shape[0]
        for index, note in enumerate(handed["image"][1]):
            st.scratch[index] = {n: x.reshape(batch, -1, *x.shape[2:]) for n, x in note.items()}
        return
    firsts: dict[str, Tensor] = {}
    for kind, (projected, notes) in handed.items():
        alive = [~features[:, 0].isnan() for features in projected]
        rows = [f[a.long().argmax()] for f, a in zip(projected, alive, strict=True)]
        firsts[kind] = torch.stack(rows).to(hidden)
        for index, note in enumerate(notes):
            known = st.scratch.setdefault(index, {})
            for name, x in note.items():
                if name not in known:
                    shape = *view.visual_index.shape, *x[0].shape[1:]
                    known[name] = x[0].new_zeros(shape).to(hidden.device)
    for r, images in enumerate(st.images):
        for j in range(len(images)):
            kind = st.kinds[r][j]
            if kind not in handed:
                st.unnoted = True
                continue
            notes = handed[kind][1]
            here = view.image[r] == j
            if view.valid is not None:
                here &= view.valid[r]
            slots = here.nonzero()[:, 0]
            match = (firsts[kind] == view.tokens[r, slots[0]]).all(1).nonzero()[:, 0]
            if not len(match):
                raise UnsupportedError(
                    "image features of an earlier encoder call reached the language model, and "
                    "the method needs notes it took while encoding them; encode and prefill in "
                    "one call"
                )
            for index, note in enumerate(notes):
                for name, x in note.items():
                    source = x[int(match[0])][: len(slots)]
                    st.scratch[index][name][r, slots] = source.to(hidden.device)
