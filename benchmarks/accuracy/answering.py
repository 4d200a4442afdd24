# SPDX-License-Identifier: Apache-2.0
"""Greedy answers to a batch of questions, and how far a model's logits are from another's.

**KL divergence of an answer.** Two models answer the same question greedily. As long as their
answers begin alike they have read the same text, so that their next-token distributions can be
compared,

    KL(p_stock || p_compressed) = sum_v p_stock(v) (log p_stock(v) - log p_compressed(v)),

in nats, from the raw logits (before any processor of `generate`), with the log-softmax in fp32. The
divergence of the answer is the mean over these steps: from the first up to and with the step at
which the answers part, or at which they end (end-of-sequence, or the longest answer allowed).
Later steps, whose texts differ, do not count.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..metrics.scores import kl_divergence
from ..shared.prompts import Batch


@dataclass
class Answers:
    """Greedy answers to a batch of B questions.

    Attributes:
        texts: decoded, without blanks at the ends.
        tokens: (B, T), padded behind the end of an answer.
        logits: T raw (B, V), fp32; none unless they were asked for.
    """

    texts: list[str]
    tokens: Tensor
    logits: tuple[Tensor, ...] = ()


@torch.no_grad()
def answer(
    model: Any, processor: Any, batch: Batch, max_new_tokens: int, logits: bool = False
) -> Answers:
    """Greedy answers to a batch; the encoder runs once for each of its images."""
    text = {k: v.to(model.device) for k, v in batch.text.items()}
    images = batch.images(model)
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        encoded = model.get_image_features(**images)
        features = [encoded.pooler_output[i] for i in batch.image_of]
        outputs = {"image": type(encoded)(pooler_output=features)}
        vision: dict[str, Any] = {"mm_encoder_outputs": outputs}
    else:  # pragma: no cover (transformers before 5.18: one encoder pass for each question)
        vision = {k: v[batch.image_of] for k, v in images.items()}
    out = model.generate(
        **text,
        **vision,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        output_logits=logits,
        return_dict_in_generate=True,
    )
    new = out.sequences[:, text["input_ids"].shape[1] :]
    texts = [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]
    return Answers(texts, new, out.logits if logits else ())


def answer_batch(model: Any, processor: Any, batch: Batch, max_new_tokens: int) -> list[str]:
    """The texts of `answer`."""
    return answer(model, processor, batch, max_new_tokens).texts


def divergences(model: Any, stock: Answers, other: Answers) -> list[float]:
    """KL divergence of each answer from that of the stock model, B numbers (see above).

    Args:
        model: whose end-of-sequence tokens end an answer.
    """
    steps = min(len(stock.logits), len(other.logits))
    mine, theirs = stock.tokens[:, :steps], other.tokens[:, :steps]
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end, dtype=mine.dtype, device=mine.device)
    alike = (mine == theirs) & ~torch.isin(mine, ends)
    counted = torch.ones_like(alike)
    counted[:, 1:] = alike[:, :-1].cumprod(1).bool()
    total = torch.zeros(len(mine), device=mine.device)
    for step in range(steps):
        kl = kl_divergence(stock.logits[step], other.logits[step])
        total += kl.where(counted[:, step], torch.zeros_like(kl))
    return (total / counted.sum(1)).tolist()
