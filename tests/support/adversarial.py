# SPDX-License-Identifier: Apache-2.0
"""Features that break rankings, and mini models that get them in place of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mini_llava as mini
import torch
from torch import Tensor

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.methods.globalcom2 import GlobalCom2
from vtc.methods.mod import HeuristicMoD, MoD
from vtc.methods.mustdrop import MustDrop
from vtc.methods.prefixkv import PrefixKV
from vtc.methods.prumerge import PruMerge
from vtc.methods.sparsevlm import SparseVLM
from vtc.methods.vidkv import VidKV
from vtc.methods.zipvl import ZipVL

Pattern = Callable[[torch.Generator, int, int], Tensor]


def _normal(g: torch.Generator, n: int, c: int) -> Tensor:
    return torch.randn(n, c, generator=g)


def _scaled(factor: float) -> Pattern:
    return lambda g, n, c: _normal(g, n, c) * factor


def _signs(value: float) -> Pattern:
    return lambda g, n, c: _normal(g, n, c).sign() * value


def _outlier(g: torch.Generator, n: int, c: int) -> Tensor:
    x = _normal(g, n, c)
    x[n // 2] *= 1e4
    return x


PATTERNS: dict[str, Pattern] = {
    "zeros": lambda g, n, c: torch.zeros(n, c),
    "all equal": lambda g, n, c: _normal(g, 1, c).expand(n, c).clone(),
    "all one number": lambda g, n, c: torch.full((n, c), 3.0),
    "four values": lambda g, n, c: _normal(g, 4, c)[torch.arange(n) % 4],
    "rank one": lambda g, n, c: _normal(g, n, 1) @ _normal(g, 1, c),
    "opposites": lambda g, n, c: _normal(g, 1, c) * (1 - 2 * (torch.arange(n) % 2))[:, None],
    "orthogonal": lambda g, n, c: torch.eye(c).repeat(-(-n // c), 1)[:n],
    "one outlier": _outlier,
    "huge": _scaled(1e4),
    "tiny": _scaled(1e-7),
    "subnormal": _scaled(1e-38),
    "half zeros": lambda g, n, c: _normal(g, n, c) * (torch.arange(n) < n // 2)[:, None],
}
"""(n, c) features of one image; all of them finite, and their norms too, in fp16 as well."""
EXTREME: dict[str, Pattern] = {
    "fp16 maximum": _signs(65504),
    "squares overflow fp32": _scaled(1e30),
    "fp32 maximum": _signs(3.4e38),
}
"""Those that fp16, or the norm in fp32, cannot hold once the model has added to them."""
BROKEN: dict[str, Pattern] = {
    "nan": lambda g, n, c: torch.full((n, c), torch.nan),
    "one nan": lambda g, n, c: _normal(g, n, c).index_fill(0, torch.tensor([n // 2]), torch.nan),
    "infinity": lambda g, n, c: _normal(g, n, c).index_fill(0, torch.tensor([n // 2]), torch.inf),
}

PLACES = ("encoder", "boundary", "llm")
"""The residual stream in front of the encoder's blocks, the features, the projected features."""

ADAPTIVE: dict[str, vtc.Method] = {
    "prumerge-adaptive": PruMerge(),
    "prumerge+": PruMerge(plus=True),
    "mustdrop-adaptive": MustDrop(theta_global=0.05, theta_individual=0.05),
    "mustdrop-coupled": MustDrop(keep_tokens=6, batch_coupled=True),
    "sparsevlm-adaptive": SparseVLM(adaptive=True),
    "prefixkv-all": PrefixKV(scope="all"),
    "zipvl-tau": ZipVL(tau=0.7),
    "zipvl-mixed": ZipVL(kv="mixed", group=8),
    "mod-heuristic-ttv": HeuristicMoD(router="ttv"),
    "globalcom2-cosine": GlobalCom2(saliency="cosine", keep_tokens=6),
}
"""Other forms of registered methods, whose branches differ."""


@cache
def methods() -> dict[str, vtc.Method]:
    """Every registered method that takes images, ready for the mini LLaVA."""
    budget = {"tome": 8, "pitome": 9}
    routers = {i: torch.randn(48, generator=torch.Generator().manual_seed(i)) for i in (1, 3)}
    special = {
        "mod": MoD(routers=routers, keep_tokens=6),
        "vidkv": VidKV(window=8, group=8),  # its prompts are longer
    }
    images = [n for n, cls in vtc.methods().items() if "frames" not in cls.needs]
    return {n: special.get(n) or seeded(n, budget.get(n, 6), 0) for n in images} | ADAPTIVE


@cache
def model(dtype: torch.dtype) -> Any:
    return mini.build(gain=3.0).to(dtype)


def features(pattern: Pattern | None, seed: int, like: Tensor) -> Tensor:
    """Substitute for the features ``like`` (n, c) of one image; None leaves them."""
    if pattern is None:
        return like
    made = pattern(torch.Generator().manual_seed(seed), *like.shape)
    return made.clamp(-3.4e38, 3.4e38).to(like.dtype)


@contextmanager
def replacing(stock: Any, place: str, patterns: list[Pattern | None], seed: int) -> Iterator[None]:
    """While image i of the model has features of pattern i; wrap the model before."""

    def replaced(x: Tensor, prefix: int = 0) -> Tensor:
        parts = [features(p, seed + i, x[i, prefix:]) for i, p in enumerate(patterns)]
        return torch.cat([x[:, :prefix], torch.stack(parts)], 1)

    projector = stock.model.multi_modal_projector
    if place == "encoder":
        tower = stock.model.vision_tower
        norm = getattr(tower, "vision_model", tower).pre_layrnorm
        handle = norm.register_forward_hook(lambda m, a, out: replaced(out, 1))
    elif place == "boundary":
        handle = projector.register_forward_pre_hook(
            lambda m, a: (replaced(a[0]), *a[1:]), prepend=True
        )
    else:
        handle = projector.register_forward_hook(lambda m, a, out: replaced(out), prepend=True)
    try:
        yield
    finally:
        handle.remove()
