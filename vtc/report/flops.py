# SPDX-License-Identifier: Apache-2.0
"""Cost of a forward. "FLOPs" follow the literature: one multiply-add counts as one."""

from __future__ import annotations

from collections.abc import Sequence


def llm_flops(
    tokens: Sequence[float], hidden: int, mlp: int, attended: Sequence[float] | None = None
) -> float:
    """The literature's count for a prefill: sum over layers of 4nD^2 + 2n^2D + 3nDM.

    Only visual tokens are counted (FastV, PyramidDrop and TransPrune use the same formula, and
    ignore grouped-query attention). LLaVA-1.5-7B with 576 tokens in 32 layers: 3.817 T.

    Args:
        tokens: visual tokens n that each layer processes.
        hidden: D; mlp: M, the width of the gated MLP.
        attended: visual tokens in each layer's attention, where fewer than in its MLP.
    """
    return sum(
        4 * a * hidden**2 + 2 * a**2 * hidden + 3 * n * hidden * mlp
        for n, a in zip(tokens, tokens if attended is None else attended, strict=True)
    )


def decoder_flops(
    tokens: Sequence[float],
    hidden: int,
    mlp: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    attended: Sequence[float] | None = None,
) -> float:
    """All tokens of the sequence, grouped-query attention as it is, without the LM head."""
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return sum(
        a * projections + 2 * a**2 * heads * head_dim + 3 * n * hidden * mlp
        for n, a in zip(tokens, tokens if attended is None else attended, strict=True)
    )


def encoder_flops(
    attended: Sequence[float], processed: Sequence[float], width: int, mlp: int
) -> float:
    """A ViT: attention on the tokens that enter a block, MLP on those that leave its merge step.

    Args:
        attended: tokens in each block's attention, prefix included.
        processed: tokens in each block's MLP.
        width: C; mlp: hidden width of the two-layer MLP.
    """
    return sum(
        4 * n * width**2 + 2 * n**2 * width + 2 * m * width * mlp
        for n, m in zip(attended, processed, strict=True)
    )
