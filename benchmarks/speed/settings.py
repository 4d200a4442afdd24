# SPDX-License-Identifier: Apache-2.0
"""Settings of `vtc speed`: shapes, prompts and methods to time, and their defaults."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch

from ...method import Method
from ...registry import known_methods
from ..shared.budgets import seeded
from .shapes import SHAPES, Prompt, Shape, dtype_on

KEEP = Fraction(2, 9)
TOWER_KEEP = Fraction(1, 5)
"""A geometric schedule that ends at 20 % of the patches costs about half the FLOPs."""
FEW = ("fastv", "visionzip")
TOWER = ("pitome", "tome")
CACHE = ("prefixkv", "vidkv")
EIGHT = (*FEW, "divprune", "pitome", "pyramiddrop", "downsample", *CACHE)
COMPILED = (("vit-large", Prompt(batch=32)), ("seven-billion", Prompt()))


@dataclass(frozen=True)
class SpeedSettings:
    """Settings of a speed run. None: the default of the device, of ``sweep`` and of ``full``.

    Attributes:
        device: "cpu" or "cuda"; dtype: of the weights.
        shapes: names of `SHAPES`; methods: names; keep: their budget.
        batches, texts, images: each combination is a part.
        decode: tokens after the first.
        full: every method; sweep: a grid of batches and texts.
        repeats, warmup: rounds, counted and not.

    Raises:
        ValueError: unknown shapes or methods.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    shapes: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    keep: Fraction | int | None = None
    batches: tuple[int, ...] | None = None
    texts: tuple[int, ...] | None = None
    images: tuple[int, ...] | None = None
    decode: int | None = None
    full: bool = False
    sweep: bool = False
    repeats: int | None = None
    warmup: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.shapes or ():
            if name not in SHAPES:
                raise ValueError(f'unknown shape "{name}"; shapes are {", ".join(SHAPES)}')
        for name in self.methods or ():
            budgeted(name, self.keep or KEEP, self.seed)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def short(self) -> bool:
        """The default run, which has an encoder and compiled models, too."""
        return not (self.full or self.sweep or self.shapes)

    @property
    def weights(self) -> torch.dtype:
        return self.dtype or dtype_on(self.device)

    @property
    def decoded(self) -> int:
        """Tokens after the first."""
        if self.decode is not None:
            return self.decode
        return 64 if self.on_gpu and self.short else 16

    @property
    def rounds(self) -> int:
        """Counted rounds."""
        return self.repeats or (3 if self.full or self.sweep else 5)

    def plan(self, own: Shape | None = None) -> list[tuple[Shape, list[Prompt], bool]]:
        """Shapes with their prompts; True where they are compiled.

        Args:
            own: instead of the shapes.
        """
        if own is not None:
            return [(own, self._prompts(own), False)]
        names = self.shapes or (
            *(("vit-large",) if self.short else ()),
            "half-billion",
            *(("seven-billion",) if self.on_gpu else ()),
        )
        plan = [(SHAPES[name], self._prompts(SHAPES[name]), False) for name in names]
        compiled = COMPILED if self.on_gpu and self.short else ()
        return plan + [(SHAPES[name], [prompt], True) for name, prompt in compiled]

    def _prompts(self, shape: Shape) -> list[Prompt]:
        if shape.encoder:
            return [Prompt(batch) for batch in self.batches or (4,)]
        batches, texts = [1, 4], [64]
        if self.sweep:
            batches, texts = ([1, 8], [64, 1024]) if self.on_gpu else ([1, 4], [16, 512])
        elif shape.name == "seven-billion":
            batches = [1, 8]
        elif self.full or shape.name not in SHAPES:
            batches = [1]
        grid = itertools.product(self.batches or batches, self.texts or texts, self.images or [1])
        return [Prompt(*sizes) for sizes in grid]

    def chosen(self, shape: Shape) -> list[Method]:
        """The methods for a shape."""
        names, keep = self.methods, self.keep
        if names is None and self.full:
            names = tuple(known_methods())
        if names is None and shape.encoder:
            names, keep = TOWER, keep or TOWER_KEEP
        if names is None and self.sweep:
            names = EIGHT if self.on_gpu else (*FEW, *CACHE)
        return [budgeted(name, keep or KEEP, self.seed) for name in names or FEW]

    def described(self) -> dict[str, Any]:
        """For the result file, defaults filled in; the plan is told by the parts."""
        return asdict(self) | {
            "dtype": str(self.weights).removeprefix("torch."),
            "keep": str(self.keep or KEEP),
            "decode": self.decoded,
            "repeats": self.rounds,
        }


def budgeted(name: str, keep: Fraction | int, seed: int) -> Method:
    """A method at a budget; as it comes where it takes none.

    Raises:
        ValueError: there is no such method.
    """
    try:
        return seeded(name, keep, seed)
    except ValueError:
        return seeded(name, None, seed)
