# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.kernels import checks
from vtc.kernels.attention_reduce import triton as kernel

F32, F16, BF16 = checks.DTYPES
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize(
    ("batch", "tq", "tk", "c", "causal", "masked", "weighted"),
    [
        (3, 1, 17, 32, True, False, False),  # one decoded token
        (1, 17, 17, 72, True, True, True),
        (1, 63, 64, 80, False, False, True),
        (1, 64, 65, 64, True, True, False),
        (3, 65, 1, 64, False, False, False),
        (1, 70, 40, 64, True, False, False),  # more queries than keys: the first see nothing
    ],
)
def test_column_sums(batch, tq, tk, c, causal, masked, weighted, dtype, device):
    flags = {"causal": causal, "masked": masked, "weighted": weighted}
    checks.check_attention(kernel, batch, tq, tk, c, dtype, device, heads=2, kv=1, **flags)


@pytest.mark.parametrize(
    ("tq", "tk", "c", "dtype", "causal"),
    [(577, 577, 64, BF16, False), (576, 576, 32, F16, True), (40, 1000, 80, F32, True)]
    + [(65, 65, 1024, BF16, False)],
)
def test_column_sums_of_one_head(tq, tk, c, dtype, causal, device):
    checks.check_attention(kernel, 1, tq, tk, c, dtype, device, heads=1, kv=1, causal=causal)


def test_nobody_to_attend_to(device):
    q = checks.features(2, 6, 32, F32, device).view(1, 2, 6, 32)
    sums = kernel.column_sums(q, q[:, :, :0], None, None, 1.0, False, None, None)
    assert sums.shape == (1, 2, 0)
