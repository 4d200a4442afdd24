# SPDX-License-Identifier: Apache-2.0
"""Views with random contents, for every stage."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vtc.reduction import Reduction
from vtc.views.decoder import DecoderView
from vtc.views.features import FeaturesView
from vtc.views.projections import Projections
from vtc.views.vision import VisionView

DEPTH, HEADS, WIDTH = 6, 4, 32
GRID = (6, 8)
N = GRID[0] * GRID[1]


def projections(batch, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, batch, HEADS, tokens, 8, generator=generator)
    return Projections(lambda rows: q[:, :, rows], lambda: k, 8**-0.5)


def vision_view(layer=0, batch=2, prefix=1, grid=GRID, seed=0, x=None, depth=DEPTH):
    total = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed + 1)
    if x is None:
        x = torch.randn(batch, prefix + total, WIDTH, generator=generator)
    return VisionView(
        x=x,
        layer=layer,
        depth=depth,
        prefix=prefix,
        has_cls=prefix > 0,
        size=torch.ones(x.shape[:2]),
        total=total,
        grid=grid,
        projections=projections(len(x), x.shape[1], seed),
    )


def features_view(batch=2, grid=GRID, seed=0, has_cls=True, depth=DEPTH):
    total = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed + 2)
    prefix = int(has_cls)
    return FeaturesView(
        features=torch.randn(batch, total, WIDTH, generator=generator),
        size=torch.ones(batch, total),
        index=torch.arange(total).expand(batch, total),
        total=total,
        grid=grid,
        prefix=prefix,
        has_cls=has_cls,
        projector=lambda x: x[..., : WIDTH // 2] * 2,
        layers={i: projections(batch, prefix + total, seed + i) for i in range(depth)},
        depth=depth,
    )


def decoder_view(images, layer=1, text=5):
    """Rows of visual tokens, then text, right-padded; the attention is random but fixed."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([sum(row) for row in images])
    n = int(counts.max())
    length = n + text
    column = torch.arange(length)
    visual = column < counts[:, None]
    is_text = (column >= counts[:, None]) & (column < counts[:, None] + text)
    valid = torch.arange(n) < counts[:, None]
    weights = torch.rand(len(images), HEADS, length, length, generator=generator).softmax(-1)

    def attention(rows):
        return weights.gather(2, rows[:, None, :, None].expand(-1, HEADS, -1, length))

    return DecoderView(
        hidden=torch.randn(len(images), length, WIDTH, generator=generator),
        layer=layer,
        depth=8,
        visual=visual,
        text=is_text,
        visual_index=torch.arange(n).expand(len(images), n),
        valid=None if bool(valid.all()) else valid,
        image=torch.zeros(len(images), n, dtype=torch.int64),
        position=torch.arange(n).expand(len(images), n),
        images=images,
        tap=SimpleNamespace(attention=attention, sublayers={}, length=length),
        ahead=lambda: None,
    ), weights


def encode(method, prefix=1, batch=2, grid=GRID, depth=DEPTH, seed=0):
    """Run a vision method through an encoder without attention; its map and the counts."""
    view = vision_view(batch=batch, prefix=prefix, grid=grid, seed=seed)
    x, size = view.x, None
    done = Reduction.identity(batch, x.shape[1])
    counts = []
    for layer in range(depth):
        v = vision_view(layer, batch, prefix, grid, seed + layer, x, depth)
        step = method.on_vision_layer(v)
        if step is not None:
            assert step.valid is None
            x, size = step.merge(x, size)
            done = done.then(step)
        counts.append(x.shape[1] - prefix)
    return done, counts


BUDGETS = [1, 2, 3, 5, 7, 12, 13, 24, 31, N // 2, N - 2, N - 1]


def well_formed(reduction, n, k):
    assert reduction.source_count == n and reduction.count == k
    assert (reduction.keep.diff(dim=1) > 0).all()
    slots = torch.arange(k).expand_as(reduction.keep)
    assert torch.equal(reduction.group.gather(1, reduction.keep), slots)
    assert reduction.group.min() >= -1 and reduction.group.max() < k
