# SPDX-License-Identifier: Apache-2.0
"""Codecs of the KV cache: bits, trits, and numbers by hand."""

from __future__ import annotations

import pytest
import torch
from naive_in_cache import CLOSE, mixed_by_hand

from vtc.cache.codecs import (
    Affine,
    MixedKeys,
    Ternary,
    from_spectrum,
    pack_bits,
    pack_trits,
    to_spectrum,
    unpack_bits,
    unpack_trits,
)


def test_bits_and_trits() -> None:
    g = torch.Generator().manual_seed(0)
    for bits in (1, 2, 4):
        codes = torch.randint(0, 2**bits, (2, 3, 32, 7), generator=g)
        packed = pack_bits(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 4 * bits, 7)
        assert torch.equal(unpack_bits(packed, bits).long(), codes)
    for n in (1, 5, 33, 512):
        codes = torch.randint(0, 3, (2, n), generator=g)
        packed = pack_trits(codes)
        assert packed.shape == (2, -(-n // 5))
        assert torch.equal(unpack_trits(packed, n).long(), codes)
    for d in (1, 2, 7, 8, 12):
        x = torch.randn(3, d, generator=g)
        f = to_spectrum(x)
        assert f.shape == x.shape
        torch.testing.assert_close(from_spectrum(f), x)
        # Real numbers as many as channels, and the full transform in them.
        whole = torch.fft.fft(x, norm="ortho")
        torch.testing.assert_close(f[:, : d // 2 + 1], whole.real[:, : d // 2 + 1])


@pytest.mark.parametrize(
    "gamma, codes, error", [(0.7, [-1, 0, 0, 1, 1, 0], 0.0467), (0.5, [-1, -1, 0, 1, 1, 0], 0.0629)]
)
def test_ternary_golden(gamma: float, codes: list[int], error: float) -> None:
    x = torch.tensor([[-0.9], [-0.3], [0.1], [0.5], [1.0], [0.2]])
    codec = Ternary(gamma)
    y = codec.decode(codec.encode(x), 6, 1)
    assert y.sign()[:, 0].tolist() == codes
    assert (x - y).square().mean().item() == pytest.approx(error, abs=1e-4)


def test_constant_channels() -> None:
    x = torch.tensor([2.5, 0.0, -1.0]).expand(8, 3)
    for codec in (Affine(2), Affine(4), Ternary()):
        torch.testing.assert_close(codec.decode(codec.encode(x), 8, 3), x)
    assert torch.isfinite(MixedKeys().decode(MixedKeys().encode(x), 8, 3)).all()


def test_bits_per_element() -> None:
    """As the documentation says, statistics included."""
    x = torch.randn(2, 2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    for codec, bits in (
        (Affine(2), 3.0),
        (Affine(4), 5.0),
        (Ternary(), 2.1),
        (MixedKeys(), 2.3),
        (MixedKeys(0.25), 1.9),
    ):
        held = sum(t.nbytes for t in codec.encode(x).values()) * 8 / x.numel()
        assert held == pytest.approx(bits, abs=0.05)


def test_mixed_keys_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    for d, share in ((12, 0.5), (12, 0.25), (16, 0.5), (9, 0.4), (8, 0.0), (8, 1.0)):
        x = torch.randn(2, 3, 32, d, generator=g) * torch.rand(d, generator=g)
        codec = MixedKeys(share)
        y = codec.decode(codec.encode(x), 32, d)
        for b in range(2):
            for h in range(3):
                torch.testing.assert_close(y[b, h], mixed_by_hand(x[b, h], share), **CLOSE)
