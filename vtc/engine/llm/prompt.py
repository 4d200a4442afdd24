# SPDX-License-Identifier: Apache-2.0
"""Layouts of prompts: of which image, and which of its tokens, each placeholder is."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UnsupportedError

Layout = tuple[list[list[int]], Tensor, Tensor]
"""Of a batch of prompts: for each row the visual tokens of each image; (B, L) image ordinal;
(B, L) index in it."""


def split_images(visual: Tensor, tokens_per_image: int | None) -> Layout:
    """Image by image, the placeholder runs of a batch of prompts.

    Args:
        visual: (B, L) bool.
        tokens_per_image: placeholders of one image where that is fixed, to split adjacent images.

    Returns:
        For each row the visual tokens of each image; (B, L) image ordinal; (B, L) index in it.

    Raises:
        UnsupportedError: a run holds only part of an image (chunked prefill).
    """
    starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    ends = visual & ~torch.nn.functional.pad(visual, (0, 1))[:, 1:]
    run = starts.long().cumsum(1) - 1
    columns = torch.arange(visual.shape[1], device=visual.device).expand_as(visual)
    first = columns.where(starts, -1).cummax(1).values
    index = columns - first
    images: list[list[int]] = [[] for _ in visual]
    for r, n in torch.stack([ends.nonzero()[:, 0], index[ends] + 1], 1).tolist():
        if tokens_per_image is None:
            images[r].append(n)
        elif n % tokens_per_image:
            raise UnsupportedError(
                f"found a run of {n} image tokens, not a multiple of {tokens_per_image}: part "
                "of an image in one forward (chunked prefill) cannot be compressed; prefill in "
                "one piece, or use vtc.compress_inputs"
            )
        else:
            images[r] += [tokens_per_image] * (n // tokens_per_image)
    if tokens_per_image is None:
        return images, run.where(visual, -1), index
    order = (visual.long().cumsum(1) - 1).where(visual, -1)
    return images, order.div(tokens_per_image, rounding_mode="floor"), index % tokens_per_image


def even_images(  # pragma: no cover (traced)
    visual: Tensor, images: int, tokens_per_image: int
) -> Layout:
    """`split_images` where every row has as many images, known without reading a tensor.

    Args:
        images: in the whole batch.

    Raises:
        UnsupportedError: they cannot be shared evenly.
    """
    batch = visual.shape[0]
    if images % batch:
        raise UnsupportedError(
            f"{images} images for {batch} prompts: torch.compile needs as many in each, so that "
            "lengths are known beforehand; run prompts with different numbers of images one by "
            "one, or compile without fullgraph=True"
        )
    each = images // batch
    torch._assert_async(
        (visual.sum(1) == each * tokens_per_image).all(),
        "torch.compile: prompts with different numbers of images; run them one by one",
    )
    order = (visual.long().cumsum(1) - 1).where(visual, -1)
    image = order.div(tokens_per_image, rounding_mode="floor")
    return [[tokens_per_image] * each] * batch, image, order % tokens_per_image


def split_packed(visual: Tensor, separator: Tensor, lengths: list[int], thumbnail: int) -> Layout:
    """`split_images` for packed images: patches of a thumbnail, then lines that end in a separator.

    Args:
        visual: (B, L) bool, placeholders of patches and separators; separator: (B, L) bool.
        lengths: placeholders of each image, in the order of rows and columns.
        thumbnail: patches in front of the lines.

    Returns:
        As `split_images`, of patches alone: separators are not counted.

    Raises:
        UnsupportedError: what one image left here is not a whole image (chunked prefill).
    """
    images: list[list[int]] = []
    image, position = torch.full_like(visual, -1, dtype=torch.long), torch.zeros_like(visual).long()
    rest = iter(lengths)
    for r, columns in enumerate(visual.cpu()):
        at = columns.nonzero()[:, 0].to(visual.device)
        ends, start = separator[r, at].cpu(), 0
        counts: list[int] = []
        while start < len(at):
            n = next(rest, 0)
            lines = ends[start : start + n].nonzero()[:, 0].tolist()
            width = lines[0] - thumbnail if lines else 0
            last = lines[-1] if lines else thumbnail - 1
            expected = list(range(thumbnail + width, n, width + 1)) if lines else []
            if start + n > len(at) or lines != expected or last != n - 1:
                raise UnsupportedError(
                    f"found {len(at)} image tokens in row {r} that are not whole packed images: "
                    "part of an image in one forward (chunked prefill), and features that were "
                    "compressed before, cannot be compressed; prefill in one piece, or use "
                    "vtc.compress_inputs"
                )
            patches = at[start : start + n][~ends[start : start + n].to(at.device)]
            image[r, patches] = len(counts)
            position[r, patches] = torch.arange(len(patches), device=at.device)
            counts.append(len(patches))
            start += n
        images.append(counts)
    return images, image, position


def split_lengths(visual: Tensor, lengths: list[int]) -> Layout:
    """`split_images` for images of known lengths, whatever text stands between their tokens.

    Args:
        visual: (B, L) bool; lengths: placeholders of each image, in the order of rows and columns.

    Raises:
        UnsupportedError: a row does not hold whole images (chunked prefill).
    """
    images: list[list[int]] = []
    rest = iter(lengths)
    for n in visual.sum(1).tolist():
        row, missing = [], n
        while missing > 0:
            row.append(next(rest, n + 1))
            missing -= row[-1]
        if missing:
            raise UnsupportedError(
                f"found {n} image tokens in row {len(images)} that are not whole images: part of "
                "an image in one forward (chunked prefill), and features that were compressed "
                "before, cannot be compressed; prefill in one piece, or use vtc.compress_inputs"
            )
        images.append(row)
    image, position = torch.full_like(visual, -1, dtype=torch.long), torch.zeros_like(visual).long()
    flat = torch.tensor([n for row in images for n in row], device=visual.device)
    ordinal = torch.tensor([j for row in images for j in range(len(row))], device=visual.device)
    first = flat.cumsum(0) - flat
    image[visual] = ordinal.long().repeat_interleave(flat)
    every = torch.arange(int(visual.sum()), device=visual.device)
    position[visual] = every - first.repeat_interleave(flat)
    return images, image, position


def in_prompt_order(
    parts: dict[str, Layout],
) -> tuple[list[list[int]], Tensor, Tensor, list[list[str]]]:
    """Images and videos as they follow each other in each row.

    Args:
        parts: by modality what `split_images` gives for its placeholders.

    Returns:
        The same for all of them, and for each row the modality of each.
    """
    if len(parts) == 1:
        kind, (images, image, position) = next(iter(parts.items()))
        return images, image, position, [[kind] * len(row) for row in images]
    first = next(iter(parts.values()))
    image, position = torch.full_like(first[1], -1), torch.zeros_like(first[2])
    images, kinds = [], []
    for r in range(len(first[0])):
        units = []
        for kind, (own, numbers, _) in parts.items():
            here = numbers[r].cpu()
            units += [(int((here == j).nonzero()[0, 0]), kind, j, n) for j, n in enumerate(own[r])]
        units.sort()
        for new, (_, kind, j, _) in enumerate(units):
            mine = parts[kind][1][r] == j
            image[r, mine] = new
            position[r, mine] = parts[kind][2][r, mine]
        images.append([n for *_, n in units])
        kinds.append([kind for _, kind, _, _ in units])
    return images, image, position, kinds
