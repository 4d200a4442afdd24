# SPDX-License-Identifier: Apache-2.0
"""`merge_tokens` in plain torch: the CPU path and the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(x: Tensor, size: Tensor | None, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `vtc.kernels.merge_tokens`."""
    batch, n, c = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = x.new_ones(batch, n, dtype=wide) if size is None else size.to(wide)
    # The last slot of each row takes what is dropped.
    slot = torch.arange(batch, device=x.device)[:, None] * (k + 1) + group.where(group >= 0, k)
    slot = slot.flatten()
    new_size = weight.new_zeros(batch * (k + 1)).index_add_(0, slot, weight.flatten())
    total = weight.new_zeros(batch * (k + 1), c)
    total.index_add_(0, slot, (x.to(wide) * weight[..., None]).reshape(batch * n, c))
    out = total.div_(new_size.clamp(min=1e-12)[:, None]).to(x.dtype).view(batch, k + 1, c)
    return out[:, :k].contiguous(), new_size.view(batch, k + 1)[:, :k].contiguous()
