# SPDX-License-Identifier: Apache-2.0
"""Fate of each visual token of a forward, step by step, from what the engines left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.encoding import History, without_prefix
from ..engine.record import Tokens
from ..reduction import Reduction

if TYPE_CHECKING:
    from ..engine.record import Packed, Record
    from .tiles import Tile


BEFORE = "before the LLM"


@dataclass(frozen=True)
class Stage:
    """The N visual tokens of one image at one place of the model.

    Attributes:
        label: of the place.
        owner: (N,) the token that each of them is part of there; -1 where it is gone, N and above
            where it went into a token of another image.
        scores: (N,) what they were ranked by right before, NaN where one was gone; None if nothing.
        changed: whether other tokens are there than at the stage before.
        share: (N,) of the LLM layers, those whose KV cache holds the token; at the end only.
    """

    label: str
    owner: Tensor
    scores: Tensor | None = None
    changed: bool = True
    share: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """(N,) bool, the tokens that are there."""
        return self.owner == torch.arange(len(self.owner))


def spread(n: int, ids: Tensor, values: Tensor) -> Tensor:
    """(n,) fp32: the values at ids, which are -1 where there is no token; NaN elsewhere."""
    out = torch.full((n,), torch.nan)
    out[ids[ids >= 0]] = values.float().cpu()[ids >= 0]
    return out


def owners(reduction: Reduction) -> Tensor:
    """(N,) the source token that each one is part of, of a reduction of one row; -1 if dropped."""
    group, keep = reduction.group[0], reduction.keep[0]
    return keep[group.clamp(min=0)].where(group >= 0, -1)


def moved(owner: Tensor, ids: Tensor, reduction: Reduction) -> Tensor:
    """Owners (n,) behind a reduction, of one row, of the tokens with the numbers ids (N,).

    Entries of ids that are -1 are no tokens.
    """
    into = torch.full((len(owner) + 1,), -1)
    target = owners(reduction)
    real = ids >= 0
    into[ids[real]] = ids[target.clamp(min=0)].where(target >= 0, -1)[real]
    return into[owner]  # -1 reads the last entry, which is -1


# ---- the encoder side ----------------------------------------------------------------------------


def encoded(history: History, image: int, behind: str) -> list[Stage]:
    """Stages of one image (or crop) of an encoder, over the patches of its full grid.

    Args:
        behind: label of what acts on the encoder's output.
    """
    steps = [] if history.pixels is None else [("before the encoder", history.pixels)]
    for block, step in history.steps:
        label = behind if block is None else f"encoder block {block}"
        steps.append((label, without_prefix(step, history.prefix)))
    now = Reduction.identity(1, prod(history.grid))
    done: dict[str, Stage] = {}
    for label, step in steps:
        one, scores = step.row(image), None
        if one.scores is not None:
            ids = now.keep[0] if now.valid is None else now.keep[0].where(now.valid[0], -1)
            scores = spread(now.source_count, ids, one.scores[0, -now.count :])
        elif label in done:
            scores = done[label].scores
        now = now.then(one)
        done[label] = Stage(label, owners(now), scores)
    out: list[Stage] = []
    owner = torch.arange(prod(history.grid))
    blocks = [f"encoder block {i}" for i in range(history.blocks)]
    for label in ["before the encoder", *blocks, behind]:
        if label in done:
            out.append(done[label])
            owner = out[-1].owner
        elif label in blocks:
            out.append(Stage(label, owner))
    return out


def _cropped(flat: Packed, i: int) -> list[Stage]:
    """Stages inside the encoder of an image in crops, over the patches of its layout."""
    layout, first = flat.layouts[i], sum(1 + prod(lay.crops) for lay in flat.layouts[:i])
    n, crops = prod(layout.side), 1 + prod(layout.crops)
    code = layout.crop * n + layout.place
    number = torch.full((crops * n + 1,), -1)  # of padding -1, too
    number[code] = torch.arange(len(code))
    start = (torch.arange(crops) * n)[:, None]
    out = []
    for parts in zip(*(encoded(flat.history, first + c, "") for c in range(crops)), strict=True):
        owner = torch.stack([p.owner for p in parts])
        owner = number[(owner + start).where(owner >= 0, -1).flatten()[code]]
        scores = None
        if parts[0].scores is not None:
            scores = torch.cat([p.scores for p in parts])[code]  # type: ignore[misc]
        out.append(Stage(parts[0].label, owner, scores))
    return out


def flat_stages(flat: Packed, i: int) -> list[Stage]:
    """Stages on the encoder side of one image of a model with flat images."""
    layout = flat.layouts[i]
    crops = hasattr(layout, "crops")
    out = _cropped(flat, i) if crops and not layout.resampled else []
    n = len(layout.rows) if crops else layout.tokens
    owner = out[-1].owner if out else torch.arange(n)
    if flat.image is None or flat.order is None:
        return out
    ids = flat.order.cpu().where(flat.image.cpu() == i, -1)
    ranked = flat.scores()
    scores = None if ranked is None else spread(n, ids, ranked)
    if flat.reduction is not None:
        owner = moved(owner, ids, flat.reduction.row(0))
    return [*out, Stage(BEFORE, owner, scores)]


class Trace:
    """The stages of every image of one forward, in the order of `Report.kept`.

    Args:
        record: what the engines left; history: of the encoder, None where nothing acts there.
        depth: LLM layers; 0 for an encoder alone.
    """

    def __init__(self, record: Record, history: History | None, depth: int) -> None:
        # Taken one by one: the next forward puts new ones into the record.
        self.history, self.depth, self.flat = history, depth, dict(record.packed)
        self.images, self.kinds, self.base = record.images, record.kinds, record.base
        self.start, self.entered, self.final = record.start, record.entered, record.final
        self.processed, self.attended = record.processed, record.attended
        self.choices, self.evictions, self.slots = record.choices, record.evictions, record.slots
        self.known: dict[int, list[Stage]] = {}
        # By the id of a processor and the size of an image: that processor, the tiles it makes.
        self.tiles: dict[tuple[int, tuple[int, int]], tuple[Any, list[Tile]]] = {}
        self.units = [(r, j) for r, row in enumerate(self.images) for j in range(len(row))]
        if not depth:
            self.units = [(i, 0) for i in range(history.images if history else 0)]

    def stages(self, index: int) -> list[Stage]:
        """All stages of an image in the order in which they ran; the last one is the end.

        Raises:
            ValueError: there is no such image.
        """
        if not 0 <= index < len(self.units):
            raise ValueError(f"no image {index}: the report has {len(self.units)}, counted from 0")
        if index not in self.known:
            row, j = self.units[index]
            if self.depth:
                every = _RowTokens(self, row).stages()
            else:
                assert self.history is not None  # or there would be no images
                stages = _marked(encoded(self.history, row, "after the encoder"))
                every = [[*stages, replace(stages[-1], label="", changed=False)]]
            self.known |= {index - j + i: stages for i, stages in enumerate(every)}
        return self.known[index]

    def at(self, index: int, layer: int | str | None) -> Stage:
        """The stage that ``layer`` of `vtc.overlay` names, with the scores of the last step up to
        there that had any.

        Raises:
            ValueError: there is no such image, or no such stage.
        """
        stages = self.stages(index)
        labels = [stage.label for stage in stages]
        kind = "LLM layer" if self.depth else "encoder block"
        name: Any = layer
        if isinstance(layer, int):
            name = BEFORE if layer == 0 and self.depth else f"{kind} {layer}"
        if layer is None:
            end = len(stages) - 1
        elif name and name in labels:
            end = labels.index(name)
        elif isinstance(layer, int):
            depth = self.depth or sum(label.startswith(kind) for label in labels)
            raise ValueError(f"no {kind} {layer}: there are {depth}, counted from 0")
        else:
            steps = ", ".join(f'"{s.label}"' for s in stages if s.changed) or "none"
            raise ValueError(f'no step "{layer}"; the steps are {steps}')
        scores = next((s.scores for s in reversed(stages[: end + 1]) if s.scores is not None), None)
        return replace(stages[end], scores=scores)

    def source(self, kind: str, place: int, entered: Tensor) -> list[Stage]:
        """Of an image of the prompt, its stages on the encoder side.

        Images may have been encoded once for several prompts, or long before: the image is the one
        whose tokens entered the LLM, first of all that at its place in the order.

        Args:
            kind: "image" or "video"; place: among those of its kind.
            entered: (n,) bool, which of its tokens entered the LLM.
        """
        flat, history = self.flat.get(kind), self.history
        count = len(flat.layouts) if flat else history.images if history else 0
        for i in sorted(range(count), key=lambda i: i != place):
            if flat is not None:
                stages = flat_stages(flat, i)
            else:
                assert history is not None  # or there would be none to count
                stages = encoded(history, i, BEFORE)
            if stages and torch.equal(stages[-1].kept, entered):
                return stages
        return [Stage(BEFORE, torch.arange(len(entered)).where(entered, -1))]


class _RowTokens:
    """The n visual tokens of one row of the batch, counted through its images."""

    def __init__(self, trace: Trace, row: int) -> None:
        self.trace, self.row, self.images = trace, row, trace.images[row]
        self.n = sum(self.images)
        self.first = torch.tensor([0, *self.images]).cumsum(0)

    def numbers(self, tokens: Tokens) -> Tensor:
        """(T,) which of the n each token is, -1 for others."""
        visual, image, position = (x[self.row].cpu() for x in tokens)
        return (self.first[image.clamp(min=0)] + position).where(visual, -1)

    def present(self, tokens: Tokens) -> Tensor:
        """(n,) bool, which of the n are among those."""
        ids = self.numbers(tokens)
        return torch.zeros(self.n, dtype=torch.bool).index_fill(0, ids[ids >= 0], True)

    def at_columns(self, columns: Tensor) -> Tensor:
        """(P,) which of the n stand at logical columns (B, P) of the KV cache, -1 for others."""
        start: Any = self.trace.start
        index = columns[self.row].cpu() - self.trace.base
        ids = self.numbers(start)
        inside = (index >= 0) & (index < len(ids))
        return ids[index.clamp(0, len(ids) - 1)].where(inside, -1)

    def encoded(self) -> list[list[Stage]]:
        """The stages of each image on the encoder side."""
        trace, row, out = self.trace, self.row, []
        start: Any = trace.start
        entered = self.present(trace.entered or start).split(self.images)
        for j, there in enumerate(entered):
            kind = trace.kinds[row][j]
            place = sum(kinds.count(kind) for kinds in trace.kinds[:row])
            place += trace.kinds[row][:j].count(kind)
            out.append(trace.source(kind, place, there))
        return out

    def stages(self) -> list[list[Stage]]:
        """All stages of each image."""
        trace = self.trace
        sources = self.encoded()
        lasts = [stages[-1] for stages in sources]
        owner = torch.cat(
            [
                (last.owner + first).where(last.owner >= 0, -1)
                for last, first in zip(lasts, self.first, strict=False)
            ]
        )
        scores = _joined(
            [last.scores if last.label == BEFORE else None for last in lasts], self.images
        )
        layers: list[Stage] = []
        beside: dict[int, Stage] = {}  # by the layer whose attention sees other tokens
        cached: list[Stage] = []
        held = torch.zeros(self.n)
        tokens = trace.processed[0]
        for i in range(trace.depth):
            for choice in trace.choices:
                if choice.layer != i:
                    continue
                real = torch.ones_like(choice.image, dtype=torch.bool)
                real = real if choice.valid is None else choice.valid
                ids = self.numbers(Tokens(real, choice.image, choice.position))
                reduction = choice.reduction.row(self.row)
                if not choice.bypass:
                    owner = moved(owner, ids, reduction)
                if reduction.scores is not None:
                    scores = spread(self.n, ids, reduction.scores[0])
            tokens = trace.processed.get(i, tokens)
            there = self.present(tokens)
            layers.append(_stage(BEFORE if i == 0 else f"LLM layer {i}", owner, there, scores))
            scores = None
            seen = self.present(trace.attended.get(i, tokens))
            if not torch.equal(seen, there):
                beside[i] = _stage(f"attention of LLM layer {i}", owner, seen)
            slots = self.in_cache(i, seen)
            if not torch.equal(slots, seen):
                ranked = self.ranked_in_cache(i)
                cached.append(_stage(f"KV cache of LLM layer {i}", owner, slots, ranked))
            held += slots
        end = layers[-1] if trace.final is None else _stage("", owner, self.present(trace.final))
        end = replace(end, label="", share=held / trace.depth * end.kept, changed=False)
        out = []
        for j, source in enumerate(sources):
            part = slice(int(self.first[j]), int(self.first[j + 1]))
            inside = [stage for stage in source if stage.label != BEFORE]
            stages = _marked([*inside, *(_cut(stage, part) for stage in layers)])
            for i in sorted(beside, reverse=True):
                stages.insert(len(inside) + i + 1, _cut(beside[i], part))
            out.append([*stages, *(_cut(stage, part) for stage in [*cached, end])])
        return out

    def in_cache(self, layer: int, seen: Tensor) -> Tensor:
        """(n,) bool, which of those ``seen`` by a layer its KV cache holds, or would without the
        sliding window of the model."""
        slots = self.trace.slots[layer] if layer < len(self.trace.slots) else None
        if slots is None:
            return seen
        whole = slots._replace(first=0).held[self.row].cpu()
        ids = self.at_columns(slots.columns).where(whole, -1)
        return torch.zeros(self.n, dtype=torch.bool).index_fill(0, ids[ids >= 0], True)

    def ranked_in_cache(self, layer: int) -> Tensor | None:
        """(n,) what the slots of a layer were ranked by."""
        for eviction in reversed(self.trace.evictions):
            if eviction.layer == layer:
                return spread(self.n, self.at_columns(eviction.columns), eviction.scores[self.row])
        return None


def _stage(label: str, owner: Tensor, there: Tensor, scores: Tensor | None = None) -> Stage:
    """A stage where only the tokens ``there`` (n,) are: the others may come back."""
    left = (owner >= 0) & there[owner.clamp(min=0)]
    return Stage(label, owner.where(left, -1), scores)


def _joined(parts: list[Tensor | None], lengths: list[int]) -> Tensor | None:
    """Scores of images one behind the other, NaN where one has none; None if none has."""
    if all(part is None for part in parts):
        return None
    pairs = zip(parts, lengths, strict=True)
    return torch.cat([torch.full((n,), torch.nan) if p is None else p for p, n in pairs])


def _marked(stages: list[Stage]) -> list[Stage]:
    """The same stages, with whether each differs from the one before."""
    before, out = torch.ones(len(stages[0].owner), dtype=torch.bool), []
    for stage in stages:
        out.append(replace(stage, changed=not torch.equal(stage.kept, before)))
        before = stage.kept
    return out


def _cut(stage: Stage, part: slice) -> Stage:
    """The part of one image of a stage of a whole row."""
    owner, n = stage.owner[part], part.stop - part.start
    mine = (owner >= part.start) & (owner < part.stop)
    owner = (owner - part.start).where(mine, (n + owner).where(owner >= 0, -1))
    scores = None if stage.scores is None else stage.scores[part]
    share = None if stage.share is None else stage.share[part]
    return replace(stage, owner=owner, scores=scores, share=share)
