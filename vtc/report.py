# SPDX-License-Identifier: Apache-2.0
"""What ran: tokens of every layer, FLOPs, KV bytes and milliseconds of the last forward."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .cost import decoder_flops, encoder_flops, llm_flops
from .reduction import Reduction
from .stages import Stage, Tokens
from .trace import Trace

if TYPE_CHECKING:
    from .adapters.base import Sites
    from .crops import CropLayout
    from .grids import GridLayout
    from .method import Method
    from .records import Record


@dataclass(repr=False)
class Report:
    """The last forward of a compressed model; counts are means over the rows that hold an image.

    Attributes:
        method: what was applied, with its parameters.
        asked: visual tokens asked for, None if no budget was given; visual_tokens: those of the
            prompt; final_tokens: those that the last layer processed; average_tokens: mean over the
            LLM layers.
        tokens_per_layer: visual tokens each LLM layer processed (encoder alone: tokens after each
            block, prefix included).
        attended_per_layer: those in each LLM layer's attention; fewer where tokens jump over it.
        kv_tokens: visual tokens in the KV cache after prefill, mean over the layers.
        flops, flops_full: the literature's formula for one row, with and without compression.
        flops_all, flops_all_full: all tokens, encoder and projector included.
        kv_bytes, kv_bytes_full: bytes of the KV cache after prefill as held in memory, and of the
            same cache without compression.
        vision_ms, method_ms, prefill_ms, decode_ms: wall time of encoder and projector, of choosing
            and moving tokens (part of the others), of the LLM prefill, and per decoded token. None
            where nothing was measured.
        kept: for each image or video, in the order of the prompt, the patch indices of the full
            grid that are left at the end; of an image in crops, indices into its `CropLayout`; of a
            video, the tokens of its frames counted through.
        kinds: "image" or "video" for each of them.
        reduction: patches to the tokens that left the encoder side, (images, N); None if untouched,
            and on models with crops.
        grid: rows and columns of patches (of one crop; of LLM tokens where patches are joined to
            them, in the first grid of the last call); (0, 0) where that is not known.
        separators: newline tokens between rows of patches; they always stay, are not among the
            visual tokens, and count in ``flops_all``.
        layouts: where patches lie, for each image of a model with crops; else None.
        grids: of each image of a model that joins patches to tokens; else None.
        videos: of each video, its frames; None where the prompt has none.
        patch: edge of a patch in pixels of what the encoder gets; 0 where that is not known.
        trace: where each token went, for `stages`, `scores` and `vtc.overlay`.
    """

    method: str
    asked: float | None
    visual_tokens: float
    final_tokens: float
    average_tokens: float
    tokens_per_layer: list[float]
    attended_per_layer: list[float] | None
    kv_tokens: float | None
    flops: float | None
    flops_full: float | None
    flops_all: float
    flops_all_full: float
    kv_bytes: int | None
    kv_bytes_full: int | None
    vision_ms: float | None
    method_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    kept: list[Tensor]
    reduction: Reduction | None
    grid: tuple[int, int]
    patch: int
    trace: Trace
    separators: float = 0.0
    layouts: list[CropLayout] | None = None
    grids: list[GridLayout] | None = None
    videos: list[GridLayout] | None = None
    kinds: list[str] = field(default_factory=list)

    def stages(self, index: int = 0) -> list[tuple[str, int]]:
        """The places in the model where other tokens of an image are there than before.

        Args:
            index: which image of the report, as in ``kept``.

        Returns:
            (label, tokens there) in the order in which they ran: "before the encoder", "encoder
            block 3" (behind it), "before the LLM", "LLM layer 8" (what it ran on), "attention of
            LLM layer 8", "KV cache of LLM layer 8" (after the prompt). Counted from 0. Any of these
            is a ``layer`` of `vtc.overlay`.

        Raises:
            ValueError: there is no such image.
        """
        stages = self.trace.stages(index)
        return [(s.label, int(s.kept.sum())) for s in stages if s.changed]

    def scores(self, index: int = 0, layer: int | str | None = None) -> Tensor | None:
        """What the tokens of an image were ranked by, (N,) fp32, NaN where one was gone before.

        Args:
            index: as in `stages`.
            layer: up to where, as ``layer`` of `vtc.overlay`; of all steps the last one counts that
                had scores.

        Returns:
            None where no step ranked tokens by scores.

        Raises:
            ValueError: there is no such image or layer.
        """
        return self.stage(index, layer).scores

    def stage(self, index: int = 0, layer: int | str | None = None) -> Stage:
        """Where each token of an image is, at the end or at ``layer`` of `vtc.overlay`.

        Raises:
            ValueError: there is no such image or layer.
        """
        return self.trace.at(index, layer)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, ready for JSON; kept patches as lists."""
        skip = ("kept", "reduction", "layouts", "grids", "videos", "trace")
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        out["kept"] = [k.tolist() for k in self.kept]
        return out

    def __str__(self) -> str:
        asked = "" if self.asked is None else f" (asked for {self.asked:g})"
        lines = [
            self.method,
            f"  visual tokens  {self.visual_tokens:g} -> {self.final_tokens:g} at the end, "
            f"{self.average_tokens:.1f} on average over the layers{asked}",
        ]
        if self.separators:
            lines.append(f"  newline tokens {self.separators:g}, all kept")
        if self.flops is not None and self.flops_full:
            share = self.flops / self.flops_full
            lines.append(f"  LLM FLOPs      {self.flops / 1e9:.2f} G, {share:.1%} (visual tokens)")
        share = self.flops_all / self.flops_all_full
        lines.append(f"  all FLOPs      {self.flops_all / 1e9:.2f} G, {share:.1%}")
        if self.kv_bytes is not None and self.kv_bytes_full:
            share = self.kv_bytes / self.kv_bytes_full
            lines.append(f"  KV cache       {self.kv_bytes / 1e6:.2f} MB, {share:.1%}")
        times = {
            "vision": self.vision_ms,
            "method": self.method_ms,
            "prefill": self.prefill_ms,
            "decode": self.decode_ms,
        }
        shown = [f"{name} {ms:.1f} ms" for name, ms in times.items() if ms is not None]
        if shown:
            lines.append(f"  time           {', '.join(shown)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """What `print` shows: tensors are left to their fields."""
        return str(self)


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
