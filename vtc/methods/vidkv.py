# SPDX-License-Identifier: Apache-2.0
"""VidKV: keep every token and hold its keys at 1.5 bits and its values at 1.58 bits.

Tao et al., Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models,
arXiv 2503.16257. Statistics run along the tokens of a row, in groups of 32, one for each channel:

    keys    the half of the channels with the largest max - min: 2 bits, s = (max - min) / 3
            the others: 1 bit, signs of the FFT along the channels times its mean magnitude
    values  q = sign(v) where |v| > gamma mean|v|, else 0                    1.58 bits
    STP     the 20 % of the visual tokens with the highest x_j . mean(text): values at 2 bits

The last 128 tokens stay as they are, and older ones are packed after the prompt and whenever 128
more have been decoded. Bytes are really saved (`Report.kv_bytes`), statistics in fp16 included: 2.3
and 2.1 bits an element. Attention sees keys and values unpacked layer by layer for the moment of
the call, so decoding gets slower, not faster, and the prompt costs what it costs without.

Departures: ternary values are multiplied by a scale, the mean |v| over what is not zero, and 1-bit
keys by plus or minus theirs; the published code returns {-1, 0, 1} and {0, scale}. gamma is the
paper's .7 (code: .5). The FFT is the real one, whose d numbers for d channels make it 1 bit and not
2. The channels are chosen for each row, head and group rather than for the flattened batch. New
groups alone are quantised, where the published code decodes and codes the whole cache again every
128 tokens. Text is every token that is no image token, not a fixed system prompt. Tokens that STP
protects are rounded up to whole groups of 32, filled with the next by relevance, and tokens that
another method dropped within the LLM count as least relevant. Padding is not packed. Bits are the
budget: a keep ratio is refused, chain a method that drops tokens to combine both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.codecs import Affine, MixedKeys, Packing, Ternary, check_group
from ..hyperparameters import check_range
from ..method import Method, StageName
from ..reduction import Reduction, ranks
from ..registry import register
from ..views.cache import CacheView
from ..views.decoder import DecoderView


def relevance(tokens: Tensor, text: Tensor, valid: Tensor) -> Tensor:
    """x_j . mean(text) in fp32, (B, N), for tokens (B, N, D), text (B, M, D), valid (B, M)."""
    weight = valid.unsqueeze(-1).float()
    mean = (text.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
    return torch.einsum("bnd,bd->bn", tokens.float(), mean)


@register
@dataclass(frozen=True, kw_only=True)
class VidKV(Method):
    """Pack the KV cache: all tokens stay.

    Args:
        key_share: of the key channels, those at 2 bits; .5 is "1.5 bits", .25 "1.25 bits".
        gamma: values below gamma times the mean magnitude become 0.
        protect: of the visual tokens, those with values at 2 bits (STP); 0 for none.
        window: last tokens that stay as they are.
        group: tokens that share statistics, a multiple of 8.
    """

    key_share: float = 0.5
    gamma: float = 0.7
    protect: float = 0.2
    window: int = 128
    group: int = 32

    name = "vidkv"
    summary = "Holds the KV cache of all tokens at about 2 bits (VidKV, arXiv 2503.16257)"
    default_ratio = 1.0
    packs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_tokens is not None or self.keep_ratio not in (None, 1.0):
            raise ValueError(
                "vidkv keeps every token and saves bits instead: set key_share, gamma and protect, "
                "or chain it behind a method that drops tokens"
            )
        check_range(self, "key_share", "a fraction of the key channels")
        check_range(self, "protect", "a fraction of the visual tokens")
        check_range(self, "gamma", "a fraction of the mean magnitude", "[)")
        check_group(self.group, self.window)

    @property
    def while_decoding(self) -> bool:
        return True

    @property
    def compiles(self) -> bool:  # pragma: no cover (traced)
        return False

    @property
    def has_budget(self) -> bool:
        return False

    @property
    def stages(self) -> frozenset[StageName]:
        return super().stages if self.protect else frozenset({"cache"})

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return (-1,)

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        """Note how relevant the embeddings of visual tokens are to the text."""
        index, valid = v.text_index
        rows = torch.arange(len(index), device=index.device)[:, None]
        score = relevance(v.tokens, v.hidden[rows, index], valid)
        v.scratch["relevance"], v.scratch["known"] = score, torch.ones_like(score)
        return None

    def on_cache(self, v: CacheView) -> Packing | None:
        due = self.group if v.step == 0 else max(self.group, self.window)
        if v.keys.shape[2] < self.window + due:
            return None
        ask = Packing(
            keys=MixedKeys(self.key_share),
            values=Ternary(self.gamma),
            window=self.window,
            due=due,
            group=self.group,
        )
        if self.protect:
            # Every visual token has a rank, of the prompt's own and of earlier turns alike. One
            # that left within the LLM has lost its notes and comes behind them all.
            lowest = torch.finfo(torch.float32).min
            rank = v.scratch["relevance"].masked_fill(v.scratch["known"] == 0, lowest)
            rank = rank.masked_fill(~v.visual, -torch.inf)
            ask.values_high, ask.rank = Affine(2), rank
            k = (self.protect * v.visual.sum(1)).round()
            ask.important = (ranks(rank) < k[:, None]) & v.visual
        return ask
