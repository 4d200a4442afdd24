# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.kernels import checks
from vtc.kernels.similarity_reduce import reference
from vtc.kernels.similarity_reduce import triton as kernel

F32, F16, BF16 = checks.DTYPES
pytestmark = pytest.mark.usefixtures("poisoned")

# Every size, width, batch and dtype, and every pair of size and dtype up to 65 tokens.
SMALL = [
    (batch, n, c, dtype)
    for n, c, batch in ((1, 32, 3), (17, 72, 1), (63, 1024, 1), (64, 64, 3), (65, 80, 1))
    for dtype in checks.DTYPES
]
LARGE = [
    (1, 130, 1024, BF16),
    (1, 577, 72, F16),
    *(pytest.param(1, n, 80, d, marks=pytest.mark.soak) for n, d in ((576, F32), (1000, BF16))),
]


@pytest.mark.parametrize(("batch", "n", "c", "dtype"), SMALL + LARGE)
def test_energy(batch, n, c, dtype, device):
    checks.check_sum(kernel, "elu", batch, n, c, dtype, device)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("kind", ["elu", "paper", "sum"])
def test_ragged_rows_without_the_diagonal(kind, dtype, device):
    checks.check_sum(kernel, kind, 3, 65, 72, dtype, device, diag=True, ragged_=True)


@pytest.mark.parametrize("kind", ["paper", "sum"])
def test_sums_of_plain_products(kind, device):
    checks.check_sum(kernel, kind, 1, 130, 64, F32, device, normalize=kind == "paper")


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_count(dtype, device):
    checks.check_count(kernel, 3, 100, 80, dtype, device)


@pytest.mark.parametrize(("batch", "n", "c", "dtype"), SMALL + LARGE)
def test_best_match(batch, n, c, dtype, device):
    checks.check_match(kernel, batch, n, c, dtype, device)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("ragged_", [False, True])
def test_best_match_with_masks_and_lengths(ragged_, dtype, device):
    checks.check_match(kernel, 3, 65, 72, dtype, device, masked=True, ragged_=ragged_)


def test_strided_halves_and_empty_sides(device):
    x = checks.features(2, 66, 64, F16, device)
    edge, partner = kernel.best_match(x[:, 0::2], x[:, 1::2], True, False, None, None, None, None)
    s = checks.cosine(x[:, 0::2], x[:, 1::2])
    checks.close(edge, s.amax(2), 2e-5)
    energy = ("elu", 0.5, 1.0, True, False, None, None)
    assert kernel.similarity_sum(x[:, :0], None, *energy).numel() == 0
    for a, b in ((x, x[:, :0]), (x[..., :0], x[..., :0])):
        for impl in (kernel, reference):  # the same on every device
            edge, partner = impl.best_match(a, b, True, False, None, None, None, None)
            assert edge.eq(-torch.inf).all() and partner.eq(0).all()
            assert torch.equal(impl.similarity_sum(a, b, *energy).cpu(), torch.zeros(2, 66))


def test_wide_inputs_use_the_large_configuration(device, monkeypatch):
    """The tiles of 4096 tokens, on few of them."""
    large = kernel.config(4096, 4096, 1024, BF16, "elu")
    assert large["BLOCK_N"] == 128
    monkeypatch.setattr(kernel, "config", lambda *args: large)
    checks.check_sum(kernel, "elu", 1, 200, 150, BF16, device)
