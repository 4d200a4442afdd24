# SPDX-License-Identifier: Apache-2.0
"""Runs of calling styles, and their comparison with the stock model and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mini_llava as mini
import pytest
import torch
from torch import Tensor

import vtc
from vtc.benchmarks.support.masked_oracle import compare
from vtc.methods.divprune import DivPrune
from vtc.methods.fastv import FastV
from vtc.methods.pitome import PiToMe
from vtc.methods.prefixkv import PrefixKV
from vtc.methods.vidkv import VidKV
from vtc.methods.visionzip import VisionZip
from vtc.transformers_contract import cache_left

CLOSE: dict[str, float] = dict(atol=1e-5, rtol=1e-5)
METHODS: dict[str, Any] = {
    "pitome": PiToMe(keep_tokens=9),
    "visionzip": VisionZip(keep_tokens=6),
    "divprune": DivPrune(keep_tokens=6),
    "fastv": FastV(keep_tokens=6),
    "prefixkv": PrefixKV(keep_tokens=6),
    "vidkv": VidKV(window=8, group=8),
    "chain": vtc.chain(PiToMe(keep_tokens=12), FastV(keep_tokens=5), PrefixKV(keep_tokens=4)),
}
"""A merge in the encoder, two ways of choosing in front of the LLM, one in it, two in the cache."""


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def wrapped(name: str, **build: Any) -> Any:
    return vtc.wrap(mini.build(**build), METHODS[name])


def logical(layer: Any) -> list[Tensor]:
    """Keys and values of a cache layer at their logical columns, zeros where it holds nothing."""
    if not hasattr(layer, "unpacked"):
        return [layer.keys.clone(), layer.values.clone()]
    out, n = [], layer.get_seq_length()
    columns = layer.columns(layer.keys.device)
    columns = columns.where(~layer.padded("filler", columns.device), n)[:, None, :, None]
    for x in layer.unpacked():
        room = x.new_zeros(*x.shape[:2], n + 1, x.shape[3])
        out.append(room.scatter(2, columns.expand_as(x), x)[:, :, :n])
    return out


def compare_codes(model: Any, run: Callable[[], Any]) -> tuple[Any, Any]:
    """Results of ``run``, and of the stock model whose cache gets the same codes after a forward.

    Attention must then see the codes at the right columns, under the right mask and positions.
    """
    engine = model.vtc.decoder
    decoder = engine.sites.decoder
    seen: list[list[list[Tensor]]] = []

    def note(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        seen.append([logical(layer) for layer in cache_left(output).layers])

    def swap(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        for layer, (keys, values) in zip(cache_left(output).layers, next(replay), strict=True):
            layer.keys, layer.values = keys.clone(), values.clone()

    handle = decoder.register_forward_hook(note, with_kwargs=True)
    got = run()
    handle.remove()
    engine.remove()
    replay: Iterator[Any] = iter(seen)
    handle = decoder.register_forward_hook(swap, with_kwargs=True)
    try:
        want = run()
    finally:
        handle.remove()
        engine.install()
    assert next(replay, None) is None, "both ran as many forwards"
    return got, want


def against_oracle(name: str, model: Any, run: Callable[[], Any]) -> tuple[Any, Any]:
    return compare_codes(model, run) if name == "vidkv" else compare(model, run)[:2]


def generated(model: Any, inputs: dict[str, Any], **how: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    how = {"max_new_tokens": 8, "do_sample": False, **how}
    out = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, 1)


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], **close: float) -> None:
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], **(close or CLOSE))
