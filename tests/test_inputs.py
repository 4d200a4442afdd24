# SPDX-License-Identifier: Apache-2.0
"""`compress_inputs`: the same answers as a wrapped model, where wrapping is refused too."""

from __future__ import annotations

import mini_llava as mini
import pytest
import torch

import vtc


def generate(model, inputs: dict, **how) -> tuple[torch.Tensor, torch.Tensor]:
    how = {"max_new_tokens": 6, "do_sample": False, **how}
    out = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, -6:], torch.stack(out.logits, 1)


@pytest.mark.parametrize("method", ["divprune", "visionzip", "tome", "random"])
@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}],
    ids=["greedy", "beams", "static-cache", "chunked-prefill"],
)
@torch.no_grad()
def test_same_as_wrapped(method: str, pad: str | None, how: dict) -> None:
    model, inputs = mini.build(), mini.prompt([1, 2] if pad else 1, batch=2, pad=pad)
    wrappable = how if "num_beams" in how else {}
    with vtc.compressing(model, method, keep_tokens=8):
        want, want_logits = generate(model, inputs, **wrappable)
    short = vtc.compress_inputs(model, inputs, method, keep_tokens=8)
    assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    assert "vtc" not in model.__dict__
    got, got_logits = generate(model, short, **how)
    assert torch.equal(got, want)
    torch.testing.assert_close(got_logits, want_logits, atol=1e-5, rtol=1e-5)


def test_refusals() -> None:
    model, inputs = mini.build(), mini.prompt(1)
    with pytest.raises(vtc.UnsupportedError, match=r"inside the language model; use vtc\.wrap"):
        vtc.compress_inputs(model, inputs, "fastv", keep_tokens=4)
    with pytest.raises(ValueError, match="pixel_values"):
        vtc.compress_inputs(model, {"input_ids": inputs["input_ids"]}, "divprune")
