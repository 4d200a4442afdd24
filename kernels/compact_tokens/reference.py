# SPDX-License-Identifier: Apache-2.0
"""`compact_tokens` in plain torch: the CPU path and the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compact(
    tensors: Sequence[Tensor],
    keep: Tensor,
    destination: Tensor | None,
    rows: int,
    flat: bool,
) -> list[Tensor]:
    """Rows of each tensor (B, N, ...) at keep (B, K), written to ``destination`` of (rows, ...).

    destination (B, K) holds -1 on slots that are not copied; None means 0, 1, 2 ... Without
    ``flat`` every slot has its own row, which holds zeros where nothing is copied.
    """
    out = []
    for x in tensors:
        batch, n = x.shape[:2]
        index = keep + torch.arange(batch, device=keep.device)[:, None] * n
        joined = x.reshape(batch * n, *x.shape[2:])
        if destination is None:
            out.append(joined.index_select(0, index.flatten()))
            continue
        live = destination >= 0
        moved = joined.index_select(0, index[live])
        out.append(joined.new_zeros(rows, *x.shape[2:]).index_copy_(0, destination[live], moved))
    return out
