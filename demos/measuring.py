# SPDX-License-Identifier: Apache-2.0
"""Generation, observed: text as it comes, and times of tokens."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

Open = Callable[[], AbstractContextManager[Any]]
"""Brings a model into a configuration for the length of a ``with`` block."""


class Watch(BaseStreamer):
    """A streamer that notes when each new token arrives and hands on all ids so far."""

    def __init__(self, tell: Callable[[list[int]], None] = lambda ids: None) -> None:
        self.tell = tell
        self.ids: list[int] = []
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:  # what `generate` puts first
            self.prompt = False
            return
        self.times.append(time.perf_counter())
        self.ids += value.reshape(-1).tolist()
        self.tell(self.ids)

    def end(self) -> None:
        pass


def generate(net: Any, inputs: Any, length: int, watch: Watch) -> None:
    """A greedy answer of at most ``length`` tokens, told to ``watch``."""
    net.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=length, streamer=watch)


@dataclass
class Times:
    """Milliseconds of one configuration: from pixels on the device to the first token, and to the
    last; medians of the rounds."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float | None:
        return statistics.median(self.first) if self.first else None

    @property
    def total_ms(self) -> float | None:
        return statistics.median(self.total) if self.total else None


def race(
    net: Any,
    inputs: Any,
    configurations: Mapping[str, Open],
    length: int,
    rounds: int,
    begin: Callable[[int], None] = lambda round_: None,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Times of several configurations on one prompt, in a new random order in each round.

    Nothing is warmed up here: each configuration must have run on this prompt before.

    Args:
        begin: told each round before it begins; alive: called at each token, to end it all by an
            exception.
    """
    times = {name: Times() for name in configurations}
    for round_ in range(rounds):
        begin(round_)
        for name in random.sample(list(configurations), len(configurations)):
            with configurations[name]():
                watch = Watch(lambda ids: alive())
                start = time.perf_counter()
                generate(net, inputs, length, watch)
            times[name].first.append(1e3 * (watch.times[0] - start))
            times[name].total.append(1e3 * (watch.times[-1] - start))
    return times
