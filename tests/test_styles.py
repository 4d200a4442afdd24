# SPDX-License-Identifier: Apache-2.0
"""Every way of calling a compressed model, for a method of each stage, against the masked oracle.

Contrastive search and DoLa left transformers itself before 5.0: ``penalty_alpha`` and
``dola_layers`` now run code from the Hub (``custom_generate="transformers-community/..."``), which
is not downloaded here. `test_own_decoding_loop` runs what such code does: a callable
``custom_generate`` with `prepare_inputs_for_generation` and a cache of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mini_llava as mini
import pytest
import torch
from oracle import compare, masked, recording
from torch import Tensor

import vtc
from vtc.methods.divprune import DivPrune
from vtc.methods.fastv import FastV
from vtc.methods.pitome import PiToMe
from vtc.methods.prefixkv import PrefixKV
from vtc.methods.vidkv import VidKV
from vtc.methods.visionzip import VisionZip

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
IN_FRONT = ["pitome", "visionzip", "divprune"]


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def wrapped(name: str, **build: Any) -> Any:
    return vtc.wrap(mini.build(**build), METHODS[name])


def interleaved(pad: str | None = "left", seed: int = 0) -> dict[str, Tensor]:
    """Text between images, two images side by side, an image at the very start; rows of 3, 1, 2."""
    g = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(4, 60, (n,), generator=g).tolist()

    image = [mini.IMAGE] * mini.PATCHES
    rows = [
        words(3) + image + words(2) + image + image + words(4),
        image + words(6),
        words(1) + image + words(5) + image + words(2),
    ]
    pixels = torch.randn(6, 3, mini.SIZE, mini.SIZE, generator=g)
    return {**mini.padded(rows, pad), "pixel_values": pixels}


# ---- the oracle of a packed cache ----------------------------------------------------------------


def logical(layer: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a compressed cache layer at their logical columns, ``like``'s elsewhere."""
    n = like.shape[2]
    there = ~layer.padded("filler", like.device)
    columns = layer.columns(like.device).where(there, n)[:, None, :, None]
    out = []
    for x in layer.unpacked():
        room = torch.cat([like, like[:, :, :1]], 2) if not out else x.new_zeros(*like.shape)
        room = room if not out else torch.cat([room, room[:, :, :1]], 2)
        out.append(room.scatter(2, columns.expand(-1, x.shape[1], -1, x.shape[3]), x)[:, :, :n])
    return out[0], out[1]


def compare_codes(model: Any, run: Callable[[], Any]) -> tuple[Any, Any]:
    """Results of ``run``, and of the stock model whose cache gets the same codes after a forward.

    Attention must then see the codes at the right columns, under the right mask and positions.
    """
    engine = model.vtc.decoder
    decoder = engine.sites.decoder
    seen: list[list[tuple[Tensor, Tensor]]] = []

    def note(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        cache = output.past_key_values
        pairs = []
        for layer in cache.layers:
            shape = layer.unpacked()[0] if hasattr(layer, "unpacked") else layer.keys
            blank = shape.new_zeros(*shape.shape[:2], layer.get_seq_length(), shape.shape[3])
            pairs.append(
                logical(layer, blank)
                if hasattr(layer, "unpacked")
                else (layer.keys.clone(), layer.values.clone())
            )
        seen.append(pairs)

    def swap(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        for layer, (keys, values) in zip(output.past_key_values.layers, next(replay), strict=True):
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


# ---- generate() ----------------------------------------------------------------------------------

HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": dict(num_beams=3, num_return_sequences=2),
    "sampling": dict(do_sample=True, num_return_sequences=3, temperature=2.0, top_k=0),
    "beam-sampling": dict(do_sample=True, num_beams=2, temperature=2.0),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_generate(name: str, how: str, pad: str) -> None:
    """Interleaved text and images, padded on either side; samples are drawn with one seed."""
    model = wrapped(name, decoder="qwen2", attention="eager" if pad == "right" else "sdpa")
    inputs = interleaved(pad)
    stock = generated(vtc.unwrap(model), inputs, **HOW[how])[1]
    vtc.wrap(model, METHODS[name])
    got, want = against_oracle(name, model, lambda: generated(model, inputs, **HOW[how]))
    same(got, want)
    assert (got[1] - stock).abs().max() > 1e-3, "no teeth"
