# SPDX-License-Identifier: Apache-2.0
"""`compress_inputs`: the same answers as a wrapped model, where wrapping is refused too."""

from __future__ import annotations

from dataclasses import dataclass

import mini_llava as mini
import pytest
import torch

import vtc
from vtc.benchmarks.support.mini_families import build, prompt


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


@dataclass(frozen=True, kw_only=True)
class Growing(vtc.Method):
    """Keeps one patch of the first image, two of the second."""

    name = "test-growing"

    def on_features(self, v):
        count = torch.arange(len(v.features)) + 1
        return vtc.Reduction.from_mask(torch.arange(v.count) < count[:, None])


@torch.no_grad()
def test_images_of_different_lengths_do_not_fit_into_one_tensor() -> None:
    """InternVL's features are one; a LLaVA's are a list."""
    with pytest.raises(vtc.UnsupportedError, match="takes the features of all images as one ten"):
        vtc.compress_inputs(build("InternVL"), prompt("InternVL", [[2]]), Growing())
    model, inputs = mini.build(), mini.prompt(2, batch=1)
    with vtc.compressing(model, Growing()):
        want = generate(model, inputs)
    got = generate(model, vtc.compress_inputs(model, inputs, Growing()))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5)


def test_refusals() -> None:
    model, inputs = mini.build(), mini.prompt(1)
    with pytest.raises(vtc.UnsupportedError, match=r"inside the language model; use vtc\.wrap"):
        vtc.compress_inputs(model, inputs, "fastv", keep_tokens=4)
    with pytest.raises(ValueError, match="pixel_values"):
        vtc.compress_inputs(model, {"input_ids": inputs["input_ids"]}, "divprune")
