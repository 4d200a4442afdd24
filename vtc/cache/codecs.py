# SPDX-License-Identifier: Apache-2.0
"""Codecs of the KV cache: numbers as packed bits, and how a method asks for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Packed = dict[str, Tensor]
"""A coded group: named tensors (..., *)."""


# ---- bits ----------------------------------------------------------------------------------------


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n, d) below 2^bits, packed along n: (..., n * bits / 8, d) uint8.

    Args:
        bits: 1, 2 or 4; n must be a multiple of 8 / bits.
    """
    per = 8 // bits
    parts = codes.to(torch.uint8).unflatten(-2, (-1, per))
    out = parts[..., 0, :].clone()
    for i in range(1, per):
        out |= parts[..., i, :] << (bits * i)
    return out


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The way back from `pack_bits`: (..., n, d) uint8."""
    mask = (1 << bits) - 1
    parts = [(packed >> (bits * i)) & mask for i in range(8 // bits)]
    return torch.stack(parts, -2).flatten(-3, -2)


def pack_trits(codes: Tensor) -> Tensor:
    """Codes 0, 1, 2 (..., n), five to a byte: (..., ceil(n / 5)) uint8."""
    short = -codes.shape[-1] % 5
    parts = torch.nn.functional.pad(codes.to(torch.uint8), (0, short)).unflatten(-1, (-1, 5))
    out = parts[..., 4].clone()
    for i in (3, 2, 1, 0):
        out = out * 3 + parts[..., i]
    return out


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """The way back from `pack_trits`: (..., n) uint8."""
    parts = []
    for _ in range(5):
        parts.append(packed % 3)
        packed = packed // 3
    return torch.stack(parts, -1).flatten(-2)[..., :n]


# ---- codecs: a group of n tokens and d channels (..., n, d) to bits and back ---------------------


@dataclass(frozen=True)
class Affine:
    """Asymmetric ``bits``-bit codes with a scale and a zero point for each channel of a group.

    s = (max - min) / (2^bits - 1), z = min, q = round((x - z) / s); the value is q s + z.
    """

    bits: int

    def encode(self, x: Tensor) -> Packed:
        low, high = x.amin(-2), x.amax(-2)
        scale, zero = ((high - low) / (2**self.bits - 1)).half(), low.half()
        s, z = scale.float().unsqueeze(-2), zero.float().unsqueeze(-2)
        # A constant channel has scale 0 and is its zero point.
        q = ((x - z) / s.where(s > 0, 1.0)).round().clamp(0, 2**self.bits - 1)
        return {"codes": pack_bits(q, self.bits), "scale": scale, "zero": zero}

    def decode(self, packed: Packed, n: int, d: int) -> Tensor:
        q = unpack_bits(packed["codes"], self.bits).float()
        return q * packed["scale"].float().unsqueeze(-2) + packed["zero"].float().unsqueeze(-2)


@dataclass(frozen=True)
class Ternary:
    """-1, 0, 1 times a scale for each channel of a group: 1.6 bits, five codes to a byte.

    q = sign(x) where |x| > gamma mean|x|, else 0; the scale is the mean |x| where q is not 0.
    """

    gamma: float = 0.7

    def encode(self, x: Tensor) -> Packed:
        size = x.abs()
        large = size > self.gamma * size.mean(-2, keepdim=True)
        scale = (size * large).sum(-2) / large.sum(-2).clamp(min=1)
        codes = (x.sign() * large + 1).flatten(-2)
        return {"codes": pack_trits(codes), "scale": scale.half()}

    def decode(self, packed: Packed, n: int, d: int) -> Tensor:
        q = unpack_trits(packed["codes"], n * d).unflatten(-1, (n, d)).float() - 1
        return q * packed["scale"].float().unsqueeze(-2)


@dataclass(frozen=True)
class MixedKeys:
    """The channels of largest range at 2 bits, the others at 1 bit in the frequency domain.

    Range is max - min over the group. The 1-bit channels, in order, are transformed by an
    orthonormal real FFT along the channels; a sign bit is kept of each real and imaginary part,
    and their mean magnitude over the group.

    Attributes:
        share: of the channels, those at 2 bits.
    """

    share: float = 0.5

    def split(self, d: int) -> int:
        """Channels of d at 2 bits."""
        return min(d, max(0, round(self.share * d)))

    def encode(self, x: Tensor) -> Packed:
        d = x.shape[-1]
        wide = self.split(d)
        order = (x.amax(-2) - x.amin(-2)).argsort(dim=-1, descending=True, stable=True)
        high, low = (part.sort(-1).values for part in (order[..., :wide], order[..., wide:]))
        mask = torch.zeros_like(order, dtype=torch.uint8).scatter_(-1, high, 1)
        short = -d % 8  # one bit a channel says which kind it is
        mask = torch.nn.functional.pad(mask, (0, short)).unsqueeze(-1)
        out = {"kind": pack_bits(mask, 1).squeeze(-1)}
        out |= {f"high_{k}": v for k, v in Affine(2).encode(_channels(x, high)).items()}
        spectrum = to_spectrum(_channels(x, low))
        out["signs"] = pack_bits(spectrum >= 0, 1)
        out["magnitude"] = spectrum.abs().mean(-2).half()
        return out

    def decode(self, packed: Packed, n: int, d: int) -> Tensor:
        wide = self.split(d)
        mask = unpack_bits(packed["kind"].unsqueeze(-1), 1).squeeze(-1)[..., :d]
        order = mask.argsort(dim=-1, descending=True, stable=True)
        parts = {k[5:]: v for k, v in packed.items() if k.startswith("high_")}
        high = Affine(2).decode(parts, n, wide)
        signs = unpack_bits(packed["signs"], 1).float() * 2 - 1
        low = from_spectrum(signs * packed["magnitude"].float().unsqueeze(-2))
        x = torch.cat([high, low], -1)
        index = order.unsqueeze(-2).expand_as(x)
        return torch.empty_like(x).scatter_(-1, index, x)


Codec = Affine | Ternary | MixedKeys


def _channels(x: Tensor, index: Tensor) -> Tensor:
    """Channels of x (..., n, d) at index (..., c)."""
    return x.gather(-1, index.unsqueeze(-2).expand(*x.shape[:-1], -1))


def to_spectrum(x: Tensor) -> Tensor:
    """Orthonormal real FFT of the last dimension as d real numbers: real parts, then imaginary."""
    d = x.shape[-1]
    if d == 0:
        return x
    f = torch.fft.rfft(x, norm="ortho")
    return torch.cat([f.real, f.imag[..., 1 : (d + 1) // 2]], -1)  # the others are always zero


def from_spectrum(x: Tensor) -> Tensor:
    """The way back from `to_spectrum`."""
    d = x.shape[-1]
    if d == 0:
        return x
    real, imag = x[..., : d // 2 + 1], x[..., d // 2 + 1 :]
    imag = torch.nn.functional.pad(imag, (1, real.shape[-1] - 1 - imag.shape[-1]))
    return torch.fft.irfft(torch.complex(real, imag), n=d, norm="ortho")


# ---- what a method asks for ----------------------------------------------------------------------


@dataclass
class Packing:
    """Answer of `Method.on_cache` that packs a layer's tokens rather than dropping them.

    Attributes:
        keys, values: how.
        window: the last tokens of each row stay as they are, at least so many.
        due: a row packs when so many tokens lie in front of its window.
        group: tokens that share statistics; only whole groups are packed.
        keys_high, values_high: for the important tokens, None to make no difference.
        important: (B, P) bool slots; a row's count is rounded up to whole groups, by rank.
        rank: (B, P) fp32, ascending importance.
    """

    keys: Codec
    values: Codec
    window: int = 128
    due: int = 1
    group: int = 32
    keys_high: Codec | None = None
    values_high: Codec | None = None
    important: Tensor | None = None
    rank: Tensor | None = None

    @property
    def levels(self) -> bool:
        return self.keys_high is not None or self.values_high is not None


def check_group(group: int, window: int) -> None:
    """Refuse settings that cannot be packed.

    Raises:
        ValueError: the group is not a multiple of 8 tokens, or the window is negative.
    """
    if isinstance(group, bool) or not isinstance(group, int) or group < 8 or group % 8:
        raise ValueError(f"group is a number of tokens, a multiple of 8; got {group!r}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise ValueError(f"window is a number of tokens, at least 0; got {window!r}")
