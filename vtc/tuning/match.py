# SPDX-License-Identifier: Apache-2.0
"""`match`: tune several methods to the same FLOPs, for a comparison at equal cost."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UnsupportedError
from ..method import Chain, Method
from ..registry import resolve
from ..report.report import Report
from ..session import Session, compressing, observe


def match(
    methods: Iterable[str | Method | Chain],
    flops: float,
    *,
    model: nn.Module,
    inputs: Any,
    tolerance: float = 0.01,
    which: Literal["all", "llm"] = "all",
    tune: int = -1,
    strict: bool = True,
) -> dict[str, Method | Chain]:
    """The methods with the `keep_ratio` at which each costs the same on this model and input.

    ``vtc.match(["fastv", "visionzip"], flops=0.4, model=model, inputs=inputs)``. The literature
    counts tokens at the end by one method and averages over the layers by another; equal FLOPs are
    fair to both. The budget is bisected over the tokens of an image until the reported share is
    within the tolerance: about log2 of their number prefills a method, at most, and one for all.

    Args:
        methods: names, methods or chains. A budget that they have is replaced, their other
            hyper-parameters stay.
        flops: wanted share of the FLOPs without compression, in (0, 1].
        model: a supported model that is not wrapped.
        inputs: what it is called with: a mapping of keyword arguments, or one tensor.
        tolerance: largest distance of the share from ``flops``.
        which: "all", the FLOPs of every token, encoder and projector included
            (``flops_all / flops_all_full`` of the report); "llm", those of the visual tokens in the
            LLM, as papers count (``flops / flops_full``).
        tune: which method of a chain is tuned, by its place; the last one by default. The others
            keep the budget they have.
        strict: False leaves out methods that cannot reach the share, with a warning each.

    Returns:
        By name ("a + b" for a chain; with its parameters where a name comes twice), in order.

    Raises:
        UnsupportedError: a method cannot reach the share; the message gives the range it reaches.
        ValueError: a share, a tolerance or a place out of range, or a model that is wrapped.
    """
    if not 0.0 < flops <= 1.0:
        raise ValueError(f"flops is a share of the uncompressed FLOPs, in (0, 1]; got {flops}")
    if not tolerance > 0.0:
        raise ValueError(f"tolerance is a distance between shares, above 0; got {tolerance}")
    if which not in ("all", "llm"):
        raise ValueError(f'which is "all" or "llm"; got {which!r}')
    if isinstance(methods, (str, Method, Chain)):
        methods = [methods]
    chosen = [resolve(m) for m in methods]
    for members in chosen:
        check_tune(members, tune)
    names = [_name(members) for members in chosen]
    with observe(model) as session:
        prefill(model, inputs)
        stock, tokens = session.report(), largest_image(session)
    flops_share(stock, which)

    out: dict[str, Method | Chain] = {}
    for name, members in zip(names, chosen, strict=True):
        try:
            found = _FlopsSearch(members, tune, model, inputs, which, tokens).find(flops, tolerance)
        except UnsupportedError as error:
            if strict:
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        out[name if names.count(name) == 1 else label(members)] = found
    return out


class _FlopsSearch:
    """Shares of the FLOPs of one method or chain, by the tokens of an image that it keeps."""

    def __init__(
        self,
        members: tuple[Method, ...],
        tune: int,
        model: nn.Module,
        inputs: Any,
        which: str,
        tokens: int,
    ) -> None:
        self.members, self.tune, self.tokens = members, tune, tokens
        self.model, self.inputs, self.which = model, inputs, which
        self.shares: dict[int, float] = {}
        self.failure: ValueError | None = None  # of a budget that the method cannot meet

    def at(self, k: int) -> Method | Chain:
        """The method or chain that keeps k of the tokens."""
        return at_ratio(self.members, self.tune, k / self.tokens)

    def share(self, k: int) -> float | None:
        """Share of the FLOPs at k tokens; None where the method cannot keep so few."""
        with compressing(self.model, self.at(k)) as session:  # refuses a model it does not fit
            try:
                prefill(self.model, self.inputs)
                report = session.report()
            except ValueError as error:
                self.failure = error
                return None
        self.shares[k] = flops_share(report, self.which)
        return self.shares[k]

    def find(self, flops: float, tolerance: float) -> Method | Chain:
        low, high = 0, self.tokens + 1  # what is asked for lies between
        while high - low > 1:
            k = (low + high) // 2
            share = self.share(k)
            if share is not None and abs(share - flops) <= tolerance:
                return self.at(k)
            if share is None or share < flops:
                low = k
            else:
                high = k
        raise self._unreached(flops, tolerance)

    def _unreached(self, flops: float, tolerance: float) -> UnsupportedError:
        shown = label(self.members)
        if not self.shares:
            return UnsupportedError(f"{shown} ran at no budget that was tried: {self.failure}")
        if self.tokens not in self.shares:
            self.share(self.tokens)
        if 1 not in self.shares and self.failure is None:
            self.share(1)
        least, most = min(self.shares.values()), max(self.shares.values())
        of = " (encoder included)" if self.which == "all" else ""
        message = f"{shown} cannot cost {flops:.1%} of the FLOPs{of}"
        if least <= flops <= most:
            below = max(s for s in self.shares.values() if s <= flops)
            above = min(s for s in self.shares.values() if s >= flops)
            return UnsupportedError(
                f"{message} within {tolerance:.1%}: the nearest budgets cost {below:.1%} and "
                f"{above:.1%}; raise the tolerance"
            )
        reason = "" if self.failure is None or flops > most else f" ({self.failure})"
        if of:
            reason += '; which="llm" counts the language model alone, strict=False leaves it out'
        return UnsupportedError(f"{message}: it reaches {least:.1%} to {most:.1%} here{reason}")


@torch.no_grad()
def prefill(model: nn.Module, inputs: Any) -> None:
    """Run the model once, on a mapping of keyword arguments or one tensor."""
    model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def flops_share(report: Report, which: str) -> float:
    """Share of the uncompressed FLOPs, of everything ("all") or of visual tokens in the LLM."""
    if which == "all":
        return report.flops_all / report.flops_all_full
    if report.flops is None or not report.flops_full:
        raise UnsupportedError('which="llm" needs a language model, and this is an encoder alone')
    return report.flops / report.flops_full


def _name(members: tuple[Method, ...]) -> str:
    return " + ".join(m.name for m in members)


def label(members: tuple[Method, ...]) -> str:
    """A method or chain with its parameters, for messages."""
    return " + ".join(map(str, members))


def check_tune(members: tuple[Method, ...], tune: int) -> None:
    """Refuse a place that the chain does not have.

    Raises:
        ValueError: the place is out of range.
    """
    if not -len(members) <= tune < len(members):
        raise ValueError(
            f"tune={tune}: {label(members)} has {len(members)} method"
            f"{'s' if len(members) > 1 else ''}, counted from 0"
        )


def at_ratio(members: tuple[Method, ...], tune: int, ratio: float) -> Method | Chain:
    """The method or chain whose member ``tune`` has this keep_ratio.

    Raises:
        UnsupportedError: the member takes no budget.
    """
    chosen = list(members)
    try:
        chosen[tune] = replace(chosen[tune], keep_ratio=ratio, keep_tokens=None)
    except ValueError as error:
        raise UnsupportedError(f"{chosen[tune]} has no keep_ratio to tune: {error}") from error
    return chosen[0] if len(chosen) == 1 else Chain(tuple(chosen))


def largest_image(session: Session) -> int:
    """Visual tokens of the largest image that the model has just seen."""
    images = [n for row in session.record.images for n in row]
    rows, columns = session.record.grid or (0, 0)
    return max(images, default=rows * columns)
