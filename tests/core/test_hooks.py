# SPDX-License-Identifier: Apache-2.0
"""Attention rows: which rows are partners under rotary embeddings."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import torch

from vtc.hooks.attention_rows import partners


def test_partners_are_those_that_rope_turns():
    cohere, glm, llama = (
        getattr(import_module(f"transformers.models.{name}.modeling_{name}"), cls)
        for name, cls in (
            ("cohere", "CohereAttention"), ("glm", "GlmAttention"), ("llama", "LlamaAttention")
        )
    )  # fmt: skip

    def of(cls, **rope):
        attn = cls.__new__(cls)
        torch.nn.Module.__init__(attn)
        attn.head_dim, attn.config = 4, SimpleNamespace(rope_parameters=rope)
        return partners(attn).tolist()

    assert of(llama) == [2, 3, 0, 1]
    assert of(cohere) == [1, 0, 3, 2]
    assert of(glm, partial_rotary_factor=0.5) == [1, 0, 2, 3]
