# SPDX-License-Identifier: Apache-2.0
"""The assembly of a `Report` from what the engines recorded."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..engine.record import Tokens
from ..reduction import Reduction
from .flops import decoder_flops, encoder_flops, llm_flops
from .report import Report
from .trace import Trace

if TYPE_CHECKING:
    from ..adapters.base import Sites
    from ..engine.record import Record
    from ..method import Method


def build_report(method: str, methods: tuple[Method, ...], sites: Sites, record: Record) -> Report:
    """Put a `Report` together from what the engines recorded.

    Raises:
        RuntimeError: nothing was recorded yet.
    """
    grid: Any = record.grid
    vision: Any = record.vision
    if grid is None:
        raise RuntimeError("nothing to report: run the model on an image first")
    if not record.encoded:
        raise RuntimeError("nothing to report: the last images were not encoded to the end")
    clock, tower = record.clock, sites.vision
    total = grid[0] * grid[1]
    joined, videos = record.grids, record.videos
    llm_grids: Any = sites.decoder and sites.decoder.grids
    # Tokens may have left inside the encoder.
    touched = vision is not None and llm_grids is None and videos is None
    entered = [total + tower.prefix] * len(tower.blocks)
    counts = list(vision.counts) if touched else entered
    attended = [vision.entered, *counts[:-1]] if touched else entered

    def encoder_cost(first: int, into: list[int], behind: list[int]) -> float:
        patches = (first - tower.prefix) * 3 * tower.patch**2 * tower.width
        return patches + encoder_flops(into, behind, tower.width, tower.mlp_width)

    def grid_cost(patches: tuple[int, int]) -> float:
        """An encoder that sees this grid by itself, or windows of it."""
        n, depth = prod(patches) + tower.prefix, len(tower.blocks)
        if llm_grids is None or llm_grids.attended is None:
            return encoder_cost(n, [n] * depth, [n] * depth)
        windows = [llm_grids.attended(patches, i) for i in range(depth)]
        return encoder_cost(n, [], []) + sum(
            encoder_flops(lengths, lengths, tower.width, tower.mlp_width) for lengths in windows
        )

    encoder = encoder_full = 0.0
    if tower.blocks:
        encoder = encoder_cost(attended[0], attended, counts)
        encoder_full = encoder_cost(entered[0], entered, entered)
    layouts = record.layouts
    # What encoder and projector took for each image and video, where each grid is a sequence.
    units: list[tuple[float, int]] = []
    for layout in [*(joined or []), *(videos or [])]:
        how: Any = sites.decoder and sites.decoder.videos
        early = layout.video and how.shrink is not None  # projected in front of the pooling
        projected_here = layout.encoded if early else layout.tokens
        units.append((sum(map(grid_cost, layout.patches)), projected_here))
    if videos:
        amounts = [1 + prod(layout.crops) for layout in layouts or []]
        units += [(n * encoder_full, n * total) for n in amounts]
    if units:
        encoder = encoder_full = sum(cost for cost, _ in units) / len(units)
    reduction = vision.reduction if touched else None
    left = total if reduction is None else reduction.count  # of each image or crop
    # How many tokens of a crop are padding is not known inside the encoder.
    budgeted = all(
        m.has_budget and (layouts is None or not m.stages <= {"pixels", "vision"}) for m in methods
    )
    decode_calls = clock.calls.get("decode", 0)
    common: dict[str, Any] = {
        "method": method,
        "vision_ms": clock.ms("vision"),
        "method_ms": clock.ms("method") if methods else None,
        "prefill_ms": clock.ms("prefill"),
        "decode_ms": clock.seconds["decode"] * 1e3 / decode_calls if decode_calls else None,
        "reduction": reduction if layouts is None else None,
        "grid": grid if "features" not in sites.missing else (0, 0),
        "layouts": layouts,
        "grids": joined,
        "videos": videos,
        "kinds": [kind for row in record.kinds for kind in row],
        "patch": tower.patch,
        "trace": Trace(
            record,
            None if vision is None else vision.history,
            0 if sites.decoder is None else len(sites.decoder.decoder.layers),
        ),
    }
    if sites.decoder is None:
        final = total if reduction is None else reduction.counts.float().mean().item()
        return Report(
            asked=min([m.budget(total, grid) for m in methods], default=total)
            if budgeted
            else None,
            visual_tokens=total,
            final_tokens=final,
            average_tokens=sum(counts) / len(counts) - tower.prefix,
            tokens_per_layer=[float(c) for c in counts],
            attended_per_layer=None,
            kv_tokens=None,
            flops=None,
            flops_full=None,
            flops_all=encoder,
            flops_all_full=encoder_full,
            kv_bytes=None,
            kv_bytes_full=None,
            kept=[] if reduction is None else _kept_by_encoder(reduction),
            **common,
        )

    if record.final is None:
        raise RuntimeError(
            "nothing to report: run the language model on a prompt with an image first"
        )
    llm = sites.decoder
    depth = len(llm.decoder.layers)
    rows = [r for r, images in enumerate(record.images) if images]

    def by_layer(known: dict[int, Tokens]) -> list[list[float]]:
        """Visual tokens of each layer and row, depth x rows."""
        layers: list[list[float]] = []
        for i in range(depth):
            same = i - 1 in known and i in known and known[i].visual is known[i - 1].visual
            if i in known and not same:
                layers.append(known[i].visual.sum(1)[rows].tolist())
            else:
                layers.append(layers[-1])
        return layers

    table = by_layer(record.processed)
    in_attention = by_layer(record.attended or record.processed)
    per_row = list(zip(*table, strict=True))
    attended_per_row = list(zip(*in_attention, strict=True))
    slots = [sum(layer) / len(layer) for layer in in_attention]
    last: tuple[Any, float] = None, 0.0
    for i, held in enumerate(record.slots[:depth]):
        if held is not None:
            if last[0] is None or any(a is not b for a, b in zip(held, last[0], strict=True)):
                last = held, held.held.sum(1).cpu()[rows].float().mean().item()
            slots[i] = last[1]  # as in the layer before
    full_rows = [sum(record.images[r]) for r in rows]
    text = [float(record.text[r]) for r in rows]

    def mean(values: Any) -> float:
        values = list(values)
        return sum(values) / len(values)

    def whole(
        tokens: Any, attended: Any, n_text: float, images: int, cost: float, projected: float
    ) -> float:
        decoder = decoder_flops(
            [n + n_text for n in tokens],
            llm.hidden,
            llm.mlp_width,
            llm.heads,
            llm.kv_heads,
            llm.head_dim,
            [n + n_text for n in attended],
        )
        weights = None if llm.grids is None else llm.grids.weights
        weights = weights or tower.width * area * llm.hidden + llm.hidden**2
        projector = projected * weights
        return decoder + images * cost + projector + llm.hidden * llm.vocab

    # What the encoder took for one image: on average, as rows are averaged too.
    crops, again = 1.0, 0.0
    if layouts is not None and not units:
        crops = mean(1 + prod(layout.crops) for layout in layouts)
        again = 0 if vision is None else vision.reprojected / len(layouts)
    area = 1 if llm.grids is None else llm.grids.fold**2  # patches behind one projected token
    before, behind = crops * total, crops * left
    if units:
        before = behind = mean(n for _, n in units)
        again = 0 if vision is None else vision.reprojected / len(units)
    images = [len(record.images[r]) for r in rows]
    flat = [[full] * depth for full in full_rows]
    projected = [behind + again] * len(rows)
    # In front of the LLM each image has a budget of its own, inside it those of a row are one.
    in_front = [m for m in methods if m.stages <= {"pixels", "vision", "features"}]
    asked = []
    for r in rows:
        first = sum(min([n, *(m.budget(n, grid) for m in in_front)]) for n in record.images[r])
        later = [sum(m.budget(n, grid) for n in record.images[r]) for m in methods]
        asked.append(min([first, *later]))
    return Report(
        asked=mean(asked) if budgeted else None,
        visual_tokens=mean(full_rows),
        final_tokens=mean(table[-1]),
        average_tokens=mean(mean(layer) for layer in table),
        tokens_per_layer=[mean(layer) for layer in table],
        attended_per_layer=[mean(layer) for layer in in_attention],
        kv_tokens=mean(slots),
        flops=mean(
            llm_flops(t, llm.hidden, llm.mlp_width, a)
            for t, a in zip(per_row, attended_per_row, strict=True)
        ),
        flops_full=mean(llm_flops(t, llm.hidden, llm.mlp_width) for t in flat),
        flops_all=mean(
            whole(t, a, n, i, crops * encoder, p * i)
            for t, a, n, i, p in zip(
                per_row, attended_per_row, text, images, projected, strict=True
            )
        ),
        flops_all_full=mean(
            whole(t, t, n, i, crops * encoder_full, before * i)
            for t, n, i in zip(flat, text, images, strict=True)
        ),
        kv_bytes=record.kv[0] or None,
        kv_bytes_full=record.kv[1] or None,
        kept=_kept_by_llm(record),
        separators=0.0 if record.separators is None else mean(record.separators[rows].tolist()),
        **common,
    )


def _kept_by_encoder(reduction: Reduction) -> list[Tensor]:
    valid = reduction.valid
    return [
        keep if valid is None else keep[valid[i]] for i, keep in enumerate(reduction.keep.cpu())
    ]


def _kept_by_llm(record: Record) -> list[Tensor]:
    final: Any = record.final
    visual, image, position = (t.cpu() for t in final)
    return [
        position[r][visual[r] & (image[r] == i)]
        for r, images in enumerate(record.images)
        for i in range(len(images))
    ]
