# SPDX-License-Identifier: Apache-2.0
"""Report of the last forward: tokens of every layer, FLOPs, KV bytes and milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..reduction import Reduction
from .trace import Stage, Trace

if TYPE_CHECKING:
    from ..layouts import CropLayout, GridLayout


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
        attended_per_layer: those in each LLM layer's attention; fewer where tokens bypass it.
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
        """Scores that ranked the tokens of an image, (N,) fp32, NaN where one was gone before.

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
        """Place of each token of an image, at the end or at ``layer`` of `vtc.overlay`.

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
        """Text that `print` shows: tensors are left to their fields."""
        return str(self)
