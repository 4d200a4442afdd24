# SPDX-License-Identifier: Apache-2.0
"""The answer of one model written by another: how far their next-token distributions are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..transformers_contract import required

LogitsProcessor: Any = required("transformers", "LogitsProcessor", "vtc/tuning/divergence.py")
LogitsProcessorList: Any = required(
    "transformers", "LogitsProcessorList", "vtc/tuning/divergence.py"
)


@dataclass(frozen=True)
class StockAnswer:
    """The stock model's greedy answer to one sample.

    Attributes:
        tokens: (B, T); written: (B, T) bool, the end token included, what follows it not.
        logits: T tensors (B, V), before any processor.
    """

    tokens: Tensor
    written: Tensor
    logits: Sequence[Tensor]

    @classmethod
    def of(cls, model: Any, sample: Mapping[str, Any], max_new_tokens: int) -> StockAnswer:
        """Let the model answer, with at most so many tokens."""
        out = generate(model, sample, max_new_tokens)
        tokens = out.sequences[:, -len(out.logits) :]
        ends = model.generation_config.eos_token_id
        ended = torch.zeros_like(tokens, dtype=torch.bool)
        if ends is not None:
            ended = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device))
        return cls(tokens, ended.cumsum(1) - ended.long() == 0, out.logits)

    def compare(self, model: Any, sample: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Let the model write this answer: (B,) divergence, and whether it would have by itself.

        Its greedy answer is the same exactly where it prefers the answer's token at every step.
        """
        pen = _Dictation(self.tokens)
        out = generate(model, sample, self.tokens.shape[1], LogitsProcessorList([pen]))
        steps = [kl_divergence(p, q) for p, q in zip(self.logits, out.logits, strict=True)]
        kl = torch.stack(steps, 1).where(self.written, 0.0).sum(1)
        same = (torch.stack(pen.same, 1) | ~self.written).all(1)
        return kl / self.written.sum(1), same


class _Dictation(LogitsProcessor):
    """Makes `generate` write a given answer, and notes where it would have written it anyway."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer
        self.same: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.answer[:, len(self.same)]
        self.same.append(scores.argmax(-1) == token)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


@torch.no_grad()
def generate(model: Any, sample: Mapping[str, Any], length: int, processors: Any = None) -> Any:
    """Greedy decoding that keeps the logits of every step."""
    return model.generate(
        **sample,
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
        logits_processor=processors,
        output_logits=True,
        return_dict_in_generate=True,
    )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension, (..., V) -> (...), in fp32.

    p is the uncompressed model, q the compressed one. Log-probabilities or logits: both are
    normalised here, in fp32. Infinite where q rules out what p does not.
    """
    log_p, log_q = log_p.float().log_softmax(-1), log_q.float().log_softmax(-1)
    p = log_p.exp()
    terms = (p * (log_p - log_q)).where(p > 0, 0.0)
    return terms.sum(-1).clamp_min(0)  # rounding can take a zero below itself
