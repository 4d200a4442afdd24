# SPDX-License-Identifier: Apache-2.0
"""What became of each visual token, step by step.

The engines leave references to tensors that they have anyway (`vtc.report.Record`), which live
until the next forward; nothing is copied or computed for it. Everything here runs when somebody
asks, on the CPU. Blocks of the encoder and layers of the LLM count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .reduction import Reduction
from .vision import History, without_prefix

if TYPE_CHECKING:
    from .crops import Packed
    from .report import Record

BEFORE = "before the LLM"


class Tokens(NamedTuple):
    """A batch of sequences: which tokens are visual, of which image of their row, and their places
    in that image; all (B, T)."""

    visual: Tensor
    image: Tensor
    position: Tensor


class Choice(NamedTuple):
    """A reduction of the N visual tokens of each row in front of an LLM layer.

    Attributes:
        image, position: (B, N) as in `Tokens`; valid: (B, N) bool, None if rows agree.
        bypass: whether the tokens that are left out come back behind the layer.
    """

    layer: int
    image: Tensor
    position: Tensor
    valid: Tensor | None
    reduction: Reduction
    bypass: bool = False


class Eviction(NamedTuple):
    """What the P slots of an LLM layer's KV cache, of logical columns (B, P), were ranked by."""

    layer: int
    columns: Tensor
    scores: Tensor


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


def spread(n: int, index: Tensor, values: Tensor) -> Tensor:
    """(n,) fp32: the values at index, NaN elsewhere."""
    out = torch.full((n,), torch.nan)
    out[index] = values.float().cpu()
    return out


def _owners(reduction: Reduction) -> Tensor:
    """(N,) the source token that each one is part of, of a reduction of one row."""
    group, keep = reduction.group[0], reduction.keep[0]
    return keep[group.clamp(min=0)].where(group >= 0, -1)


def _moved(owner: Tensor, ids: Tensor, reduction: Reduction, row: int, real: Any) -> Tensor:
    """Owners (n,) behind a reduction of the tokens ``ids`` (N,); real: (N,), False on padding."""
    one = reduction.row(row)
    into = torch.full((len(owner) + 1,), -1)
    target = _owners(one)
    into[ids[real]] = ids[target.clamp(min=0)].where(target >= 0, -1)[real]
    return into[owner]  # -1 reads the last entry, which is -1


# ---- the encoder side ----------------------------------------------------------------------------


def _encoded(history: History, image: int, behind: str) -> list[Stage]:
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
            real = slice(None) if now.valid is None else now.valid[0]
            scores = spread(now.source_count, now.keep[0][real], one.scores[0, -now.count :][real])
        elif label in done:
            scores = done[label].scores
        now = now.then(one)
        done[label] = Stage(label, _owners(now), scores)
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


def _cropped(packed: Packed, i: int) -> list[Stage]:
    """Stages inside the encoder of an image in crops, over the patches of its layout."""
    layout, first = packed.layouts[i], sum(1 + prod(lay.crops) for lay in packed.layouts[:i])
    n, crops = prod(layout.side), 1 + prod(layout.crops)
    code = layout.crop * n + layout.place
    number = torch.full((crops * n + 1,), -1)  # of padding -1, too
    number[code] = torch.arange(len(code))
    start = (torch.arange(crops) * n)[:, None]
    out = []
    for parts in zip(*(_encoded(packed.history, first + c, "") for c in range(crops)), strict=True):
        owner = torch.stack([p.owner for p in parts])
        owner = number[(owner + start).where(owner >= 0, -1).flatten()[code]]
        scores = None
        if parts[0].scores is not None:
            scores = torch.cat([p.scores for p in parts])[code]  # type: ignore[misc]
        out.append(Stage(parts[0].label, owner, scores))
    return out


def _packed(packed: Packed, i: int) -> list[Stage]:
    """Stages on the encoder side of one image of a model that packs them."""
    layout = packed.layouts[i]
    crops = hasattr(layout, "crops")
    out = _cropped(packed, i) if crops and not layout.resampled else []
    n = len(layout.rows) if crops else layout.tokens
    owner = out[-1].owner if out else torch.arange(n)
    if packed.image is None or packed.order is None:
        return out
    order, here = packed.order.cpu(), packed.image.cpu() == i
    ranked = packed.scores()
    scores = None if ranked is None else spread(n, order[here], ranked.cpu()[here])
    if packed.reduction is not None:
        into = torch.full((n + 1,), -1)
        target = _owners(packed.reduction.row(0))
        into[order[here]] = order[target.clamp(min=0)].where(target >= 0, -1)[here]
        owner = into[owner]
    return [*out, Stage(BEFORE, owner, scores)]


# ---- all of it -----------------------------------------------------------------------------------


class Trace:
    """The stages of every image of one forward, in the order of `Report.kept`.

    Args:
        record: what the engines left; history: of the encoder, None where nothing acts there.
        depth: LLM layers; 0 for an encoder alone.
    """

    def __init__(self, record: Record, history: History | None, depth: int) -> None:
        # Taken one by one: the next forward puts new ones into the record.
        self.history, self.depth, self.packed = history, depth, dict(record.packed)
        self.images, self.kinds, self.base = record.images, record.kinds, record.base
        self.start: Any = record.start
        self.entered, self.final = record.entered or record.start, record.final
        self.processed, self.attended = record.processed, record.attended
        self.choices, self.evictions, self.slots = record.choices, record.evictions, record.slots
        self.known: dict[int, list[Stage]] = {}
        self.units = [(r, j) for r, row in enumerate(self.images) for j in range(len(row))]
        if not depth:
            self.units = [(i, 0) for i in range(history.images if history else 0)]

    def stages(self, index: int) -> list[Stage]:
        """All stages of an image in the order in which they ran; the last is the end.

        Raises:
            ValueError: there is no such image.
        """
        if not 0 <= index < len(self.units):
            raise ValueError(f"no image {index}: the report has {len(self.units)}, counted from 0")
        if index in self.known:
            return self.known[index]
        if self.depth:
            first = index - self.units[index][1]
            for j, stages in enumerate(self._row(self.units[index][0])):
                self.known[first + j] = stages
        else:
            assert self.history is not None  # or there would be no images
            stages = _marked(_encoded(self.history, index, "after the encoder"))
            self.known[index] = [*stages, replace(stages[-1], label="", changed=False)]
        return self.known[index]

    def at(self, index: int, layer: int | str | None) -> Stage:
        """The stage that ``layer`` of `vtc.overlay` names, with the scores of the last step up to
        there that had any.

        Raises:
            ValueError: there is no such image, or no such stage.
        """
        stages = self.stages(index)
        labels = [stage.label for stage in stages]
        if layer is None:
            end = len(stages) - 1
        elif isinstance(layer, str):
            if layer not in labels or not layer:
                steps = ", ".join(f'"{s.label}"' for s in stages if s.changed) or "none"
                raise ValueError(f'no step "{layer}"; the steps are {steps}')
            end = labels.index(layer)
        else:
            kind = "LLM layer" if self.depth else "encoder block"
            name = BEFORE if layer == 0 and self.depth else f"{kind} {layer}"
            if name not in labels:
                depth = self.depth or sum(x.startswith(kind) for x in labels)
                raise ValueError(f"no {kind} {layer}: there are {depth}, counted from 0")
            end = labels.index(name)
        scores = next((s.scores for s in reversed(stages[: end + 1]) if s.scores is not None), None)
        return replace(stages[end], scores=scores)

    # ---- a row of the batch ------------------------------------------------------------------

    def _sources(self, row: int) -> list[list[Stage]]:
        """Of each image of a row, its stages on the encoder side.

        Images may have been encoded in another order, once for several prompts, or long before: an
        image is the one whose tokens entered the LLM, the same in order before all others.
        """
        out: list[list[Stage]] = []
        for j, n in enumerate(self.images[row]):
            kind = self.kinds[row][j]
            packed, history = self.packed.get(kind), self.history
            count = len(packed.layouts) if packed else history.images if history else 0
            entered = self._present(self.entered, row)[self._slice(row, j)]
            place = sum(k == kind for kinds in self.kinds[:row] for k in kinds)
            place += self.kinds[row][:j].count(kind)
            found: list[Stage] | None = None
            for e in sorted(range(count), key=lambda e: e != place):
                stages = self._source(kind, e)
                if stages and torch.equal(stages[-1].kept, entered):
                    found = stages
                    break
            if found is None:
                every = torch.arange(n)
                found = [Stage(BEFORE, every.where(entered, -1))]
            out.append(found)
        return out

    def _source(self, kind: str, e: int) -> list[Stage]:
        packed = self.packed.get(kind)
        if packed is not None:
            return _packed(packed, e)
        return [] if self.history is None else _encoded(self.history, e, BEFORE)

    def _slice(self, row: int, j: int) -> slice:
        first = sum(self.images[row][:j])
        return slice(first, first + self.images[row][j])

    def _number(self, row: int, image: Tensor, position: Tensor) -> Tensor:
        """Tokens by number, counted through the images of a row."""
        first = torch.tensor([0, *self.images[row]]).cumsum(0)
        return first[image] + position

    def _present(self, tokens: Any, row: int) -> Tensor:
        """(n,) bool, which visual tokens of a row are among those (`Tokens`)."""
        visual, image, position = (x[row].cpu() for x in tokens)
        out = torch.zeros(sum(self.images[row]), dtype=torch.bool)
        out[self._number(row, image[visual], position[visual])] = True
        return out

    def _row(self, row: int) -> list[list[Stage]]:
        """The stages of each image of a row."""
        sources = self._sources(row)
        parts = [self._slice(row, j) for j in range(len(sources))]
        n = sum(self.images[row])
        owner = torch.cat(
            [
                (part.start + s[-1].owner).where(s[-1].owner >= 0, -1)
                for s, part in zip(sources, parts, strict=True)
            ]
        )
        scores: Tensor | None = None
        if any(s[-1].label == BEFORE and s[-1].scores is not None for s in sources):
            empty = torch.full((n,), torch.nan)
            scores = torch.cat(
                [
                    empty[part] if s[-1].scores is None else s[-1].scores
                    for s, part in zip(sources, parts, strict=True)
                ]
            )
        layers: list[Stage] = []
        extra: dict[int, Stage] = {}  # by the layer whose attention sees fewer
        cached: list[Stage] = []
        held = torch.zeros(n)
        now = self.processed[0]
        for i in range(self.depth):
            for choice in self.choices:
                if choice.layer != i:
                    continue
                ids = self._number(row, choice.image[row].cpu(), choice.position[row].cpu())
                real = slice(None) if choice.valid is None else choice.valid[row].cpu()
                if not choice.bypass:
                    owner = _moved(owner, ids, choice.reduction, row, real)
                if choice.reduction.scores is not None:
                    scores = spread(n, ids[real], choice.reduction.scores[row].cpu()[real])
            now = self.processed.get(i, now)
            alive = self._present(now, row)
            layers.append(self._stage(BEFORE if i == 0 else f"LLM layer {i}", owner, alive, scores))
            scores = None
            seen = self._present(self.attended.get(i, now), row)
            if not torch.equal(seen, alive):
                extra[i] = self._stage(f"attention of LLM layer {i}", owner, seen)
            slots = self._in_cache(i, row)
            if slots is not None and not torch.equal(slots, seen):
                ranked = self._ranked_in_cache(i, row)
                cached.append(self._stage(f"KV cache of LLM layer {i}", owner, slots, ranked))
            held += seen if slots is None else slots
        alive = layers[-1].kept if self.final is None else self._present(self.final, row)
        end = replace(self._stage("", owner, alive), share=held / self.depth * alive)
        out = []
        for s, part in zip(sources, parts, strict=True):
            inside = [stage for stage in s if stage.label != BEFORE]
            main = _marked([*inside, *(_cut(stage, part) for stage in layers)])
            stages: list[Stage] = main[: len(inside)]
            for i, stage in enumerate(main[len(inside) :]):
                stages += [stage, _cut(extra[i], part)] if i in extra else [stage]
            out.append([*stages, *(_cut(c, part) for c in cached), _cut(end, part)])
        return out

    @staticmethod
    def _stage(label: str, owner: Tensor, alive: Tensor, scores: Tensor | None = None) -> Stage:
        """A stage where only some tokens are there: the others may come back."""
        there = (owner >= 0) & alive[owner.clamp(min=0)]
        return Stage(label, owner.where(there, -1), scores, changed=label != "")

    def _in_cache(self, layer: int, row: int) -> Tensor | None:
        """(n,) bool, the tokens of a row in the KV cache of a layer; None if it was left alone."""
        slots = self.slots[layer] if layer < len(self.slots) else None
        if slots is None:
            return None
        columns, visual, filler = slots
        here = visual[row] if filler is None else visual[row] & ~filler[row]
        columns = columns[row][here] - self.base
        return self._present(Tokens(*(x[:, columns[columns >= 0]] for x in self.start)), row)

    def _ranked_in_cache(self, layer: int, row: int) -> Tensor | None:
        for at, columns, scores in reversed(self.evictions):
            if at == layer:
                start = Tokens(*(x[row].cpu() for x in self.start))
                index = columns[row].cpu() - self.base
                there = (index >= 0) & (index < len(start.visual))
                there &= start.visual[index.clamp(0, len(start.visual) - 1)]
                index = index[there]
                ids = self._number(row, start.image[index], start.position[index])
                return spread(sum(self.images[row]), ids, scores[row].cpu()[there])
        return None


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
