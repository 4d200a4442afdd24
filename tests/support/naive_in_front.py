# SPDX-License-Identifier: Apache-2.0
"""Naive formulas and runs of methods in front of the LLM."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import mini_llava as mini
import torch

import vtc
from vtc.methods.cdpruner import CDPruner, TextQuery
from vtc.methods.holov import HoloV
from vtc.methods.prumerge import PruMerge
from vtc.methods.tokencorr import TokenCorr
from vtc.methods.vispruner import VisPruner
from vtc.views.projections import Projections

METHODS = {
    "prumerge": PruMerge,
    "prumerge plus": lambda **k: PruMerge(plus=True, **k),
    "vispruner": VisPruner,
    "vispruner received": lambda **k: VisPruner(saliency="received", **k),
    "vispruner important": lambda **k: VisPruner(important=1.0, **k),
    "vispruner diverse": lambda **k: VisPruner(important=0.0, **k),
    "holov": HoloV,
    "holov code": lambda **k: HoloV(variant="code", **k),
    "holov tau": lambda **k: HoloV(tau=3.0, chunks=5, saliency="received", **k),
    "cdpruner": lambda **k: CDPruner(relevance="none", **k),
    "cdpruner text": lambda **k: CDPruner(text=query(), **k),
    "tokencorr": TokenCorr,
    "tokencorr drawn": lambda **k: TokenCorr(deterministic=False, seed=3, **k),
    "tokencorr received": lambda **k: TokenCorr(saliency="received", **k),
}
ADAPTIVE = {
    "prumerge": PruMerge(),
    "prumerge plus": PruMerge(plus=True),
    "tokencorr": TokenCorr(similarity=0.1),
    "tokencorr drawn": TokenCorr(similarity=0.1, deterministic=False),
}


def query(rows=1):
    """Text in the space of the first eight features of a patch."""
    text = torch.randn(rows, 8, generator=torch.Generator().manual_seed(9))
    return TextQuery(text, lambda x: x[..., :8])


def rows_of(view, rows):
    """The same view with only these images."""

    def part(p):
        return Projections(lambda r: p.query(r)[rows], lambda: p.key()[rows], p.scale)

    return replace(
        view,
        features=view.features[rows],
        size=view.size[rows],
        index=view.index[rows],
        layers={i: part(p) for i, p in view.layers.items()},
    )


def stock(seed=0, batch=2):
    """The model, its inputs, and for each image features, hidden states, maps, q and k by block."""
    model = mini.build("clip", attention="eager", seed=seed)
    inputs = mini.prompt(1, batch=batch, seed=seed)
    tower = model.model.vision_tower
    q, k, handles = {}, {}, []
    for i, layer in enumerate(b for n, b in tower.named_modules() if n.split(".")[-1].isdigit()):
        for name, into in (("q_proj", q), ("k_proj", k)):
            module = getattr(layer.self_attn, name)
            handles.append(
                module.register_forward_hook(
                    lambda m, a, out, into=into, i=i: into.__setitem__(i, out)
                )
            )
    with torch.no_grad():
        out = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert sorted(q) == [0, 1, 2, 3]
    return SimpleNamespace(
        model=model,
        inputs=inputs,
        features=out.hidden_states[-2][:, 1:],
        maps=[a[:, :, 0, 1:].mean(1) for a in out.attentions],
        q={i: x.detach() for i, x in q.items()},
        k={i: x.detach() for i, x in k.items()},
    )


@torch.no_grad()
def run(case, method):
    """Patches kept of each image, and what the projector got."""
    seen = []
    with vtc.compressing(case.model, method) as session:
        projector = case.model.model.multi_modal_projector
        handle = projector.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        case.model(**case.inputs)
        handle.remove()
        report = session.report()
    assert report.asked is None or report.asked == report.final_tokens
    assert report.final_tokens == sum(map(len, report.kept)) / len(report.kept)
    return [k.tolist() for k in report.kept], seen[0]


def cosine(a, b):
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def naive_outliers(scores):
    s = sorted(scores.tolist())

    def quantile(p):
        at = p * (len(s) - 1)
        low = math.floor(at)
        return s[low] + (at - low) * (s[min(low + 1, len(s) - 1)] - s[low])

    q1, q3 = quantile(0.25), quantile(0.75)
    return [i for i, x in enumerate(scores.tolist()) if x > q3 + 1.5 * (q3 - q1)]


def best(scores, among, k):
    return sorted(among, key=lambda i: (-float(scores[i]), i))[:k]
