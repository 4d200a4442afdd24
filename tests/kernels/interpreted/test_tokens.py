# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.kernels import checks
from vtc.kernels.compact_tokens import triton as compact
from vtc.kernels.merge_tokens import triton as merge

F32, F16, BF16 = checks.DTYPES
pytestmark = pytest.mark.usefixtures("poisoned")

SMALL = [
    (batch, n, c, dtype)
    for n, c, batch in ((1, 32, 3), (17, 72, 1), (63, 1024, 1), (64, 64, 3), (65, 80, 3))
    for dtype in checks.DTYPES
]
LARGE = [(1, 576, 64, BF16), (1, 577, 1024, F16), (3, 577, 72, F32), (1, 1000, 80, BF16)]


@pytest.mark.parametrize(("batch", "n", "c", "dtype"), SMALL + LARGE)
@pytest.mark.parametrize("sized", [True, False])
def test_merge(batch, n, c, dtype, sized, device):
    checks.check_merge(merge, batch, n, c, dtype, device, sized)


@pytest.mark.parametrize(("batch", "n", "c", "dtype"), SMALL + LARGE)
def test_compact(batch, n, c, dtype, device):
    checks.check_compact(compact, batch, n, c, dtype, device)


def test_nothing_to_merge(device):
    x, group = torch.ones(2, 5, 3, device=device), torch.full((2, 5), -1, device=device)
    merged, size = merge.merge(x, None, group, 4)
    assert merged.eq(0).all() and size.eq(0).all()
    merged, size = merge.merge(x[:, :0], None, group[:, :0], 4)
    assert merged.eq(0).all() and size.eq(0).all()
    merged, size = merge.merge(x, None, group, 0)
    assert merged.shape == (2, 0, 3) and size.shape == (2, 0)
    merged, size = merge.merge(x[..., :0], None, group + 1, 2)
    assert merged.shape == (2, 2, 0) and size.tolist() == [[5, 0]] * 2


def test_merging_in_float64_loses_nothing(device):
    """The kernel itself adds up in fp32."""
    x = torch.tensor([[[1.0], [1e-12]]], dtype=torch.float64, device=device)
    merged, _ = merge.merge(x, None, torch.zeros(1, 2, dtype=torch.long, device=device), 1)
    assert merged.item() == (1 + 1e-12) / 2
