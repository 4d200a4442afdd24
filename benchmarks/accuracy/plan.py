# SPDX-License-Identifier: Apache-2.0
"""BenchSettings of a benchmark: all that it runs and that its answers depend on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...method import Method
from ...registry import resolve
from ...tuning.match import match
from ..metrics.scores import Metric
from ..shared.budgets import SHARES, seeded, token_budgets
from ..shared.provenance import describe_model
from .batches import Samples
from .rows import AccuracyRow


@dataclass(frozen=True)
class BenchSettings:
    """How a benchmark runs.

    Attributes:
        methods: registered names.
        keep: budgets, shares of the visual tokens or counts; the uncompressed model always runs.
        flops: instead of budgets, the share of the LLM's FLOPs (visual tokens) that every method is
            tuned to with `vtc.match`; one that cannot reach it says so in its row.
        batch_size: questions answered together; max_new_tokens: length of an answer.
        repeats: timed forwards of each configuration after one warm-up; 0 measures no time.
        seed: of the bootstrap and of methods that draw at random.
    """

    methods: tuple[str, ...]
    keep: tuple[Fraction | int, ...] = SHARES
    flops: float | None = None
    batch_size: int = 20
    max_new_tokens: int = 6
    repeats: int = 7
    seed: int = 0

    def plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "methods": [*self.methods], "keep": [str(k) for k in self.keep]}


def plan(
    model: Any, inputs: dict[str, torch.Tensor], total: int, settings: BenchSettings
) -> list[tuple[AccuracyRow, Method | None]]:
    """A row for each configuration to run, and its method; None where it cannot be made.

    Methods that take no budget run once, as they come.
    """
    plans: list[tuple[AccuracyRow, Method | None]] = []
    for name in settings.methods:
        plain = seeded(name, None, settings.seed)
        stages: list[str] = sorted(plain.stages)
        budgets = token_budgets(settings.keep, total) if settings.flops is None else {None: None}
        for tokens, keep in budgets.items():
            row, method = AccuracyRow(name, stages, tokens), None
            try:
                if settings.flops is None:
                    method = seeded(name, keep, settings.seed)
                else:
                    how: dict[str, Any] = {"model": model, "inputs": inputs, "which": "llm"}
                    how["tolerance"] = max(0.01, 1 / total)  # no finer than a token
                    (method,) = resolve(match([plain], flops=settings.flops, **how)[name])
            except ValueError as error:  # out of reach, or it takes no budget
                row.error = str(error)
            plans.append((row, method))
        if settings.flops is None and plans[-1][1] is None:
            del plans[-len(budgets) :]
            plans.append((AccuracyRow(name, stages, None), plain))
    for row, method in plans:
        row.parameters = "" if method is None else str(method)
    return plans


def conditions(
    model: Any, task: str, samples: Samples, metric: Metric, settings: BenchSettings
) -> dict[str, Any]:
    """BenchSettings that answers depend on, for the journal; a run goes on only with the same."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.named_parameters():  # a few values of each tell checkpoints apart
        plain = type(weight) is torch.nn.Parameter and weight.numel() and not weight.is_meta
        few = weight.detach()[(0,) * (weight.dim() - 1)].reshape(-1)[:8].tolist() if plain else []
        digest.update(f"{name} {tuple(weight.shape)} {few}".encode())
    return {
        "task": task,
        "fingerprint": samples.fingerprint,
        "metric": metric.name,
        "settings": {k: v for k, v in settings.plain().items() if k != "repeats"},
        "model": {**describe_model(model), "weights": digest.hexdigest()},
        "vtc": {"version": __version__, "source": _source()},
    }


def _source() -> str:
    """A digest of the package's Python files: a commit would not tell what was changed since."""
    digest, root = hashlib.blake2b(digest_size=8), Path(__file__).absolute().parents[2]
    for folder, _, names in sorted(os.walk(root, followlinks=True)):  # parts of it are links
        for name in sorted(names):
            if name.endswith(".py"):
                digest.update(name.encode() + (Path(folder) / name).read_bytes())
    return digest.hexdigest()
