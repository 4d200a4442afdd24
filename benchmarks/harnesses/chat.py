# SPDX-License-Identifier: Apache-2.0
"""Chats with images, answered in padded batches by a stock or compressed model.

What the plug-ins for evaluation engines share. A chat is a list of messages as
`processor.apply_chat_template` takes them; an image is a PIL image, a path or an address. Nothing
of ours is installed on a stock model, so its times are its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.image_utils import load_image

from ...errors import UnsupportedError
from ...method import Chain, Method
from ...report.report import Report
from ...session import wrap
from ..measure.timing import synchronize

Chat = list[dict[str, Any]]

MAX_NEW_TOKENS = 1024
"""Of an answer, where nobody says; as lmms-eval's own Hugging Face models have it."""


def user_turn(images: Sequence[Any], text: str) -> Chat:
    """One question about some images."""
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def images_of(chat: Chat) -> list[Any]:
    """The images of a chat, in order.

    Raises:
        UnsupportedError: a video or a sound.
    """
    found = []
    for message in chat:
        for part in message["content"]:
            if part["type"] == "image":
                found.append(part["image"])
            elif part["type"] != "text":
                raise UnsupportedError(
                    f"{part['type']} in a prompt: the plug-ins of vtc take images and text"
                )
    return found


def chat_prompt(processor: Any, chat: Chat) -> str:
    """A chat as text, ready for the answer: by the chat template, else as LLaVA-1.5 reads it."""
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(chat, add_generation_prompt=True)
    names = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}
    turns = [
        names[message["role"]]
        + "".join("<image>\n" if p["type"] == "image" else p["text"] for p in message["content"])
        for message in chat
    ]
    return " ".join([*turns, "ASSISTANT:"])


@dataclass(frozen=True)
class Reply:
    """An answer, and tokens of its prompt (image placeholders included) and of itself."""

    text: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class BatchStats:
    """Time and tokens of one batch.

    ``seconds`` begin with the inputs on the device; ``first`` of them end with the first logits.
    ``steps`` are decoded tokens behind the first one. No report without method or image.
    """

    samples: int
    seconds: float
    first: float
    steps: int
    tokens: int
    report: Report | None


class FirstLogits(LogitsProcessor):
    """Notes when the logits of the first new token are there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.time = device, 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.time:
            synchronize(self.device)
            self.time = time.perf_counter()
        return scores


class ChatModel:
    """A model that answers chats; with a method it is wrapped, without one it is left alone.

    ``facts`` grows by one entry for each batch.
    """

    def __init__(self, model: Any, processor: Any, method: Method | Chain | None = None) -> None:
        self.model, self.processor = model, processor
        self.session: Any = None if method is None else wrap(model, method).vtc
        self.facts: list[BatchStats] = []
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def answer(self, chats: Sequence[Chat], **generation: Any) -> list[Reply]:
        """Answers in the order of the chats; ``generation`` goes to `generate`.

        Raises:
            UnsupportedError: a prompt that the processor or the method cannot take.
            RuntimeError: other numbers of tokens ran than the method was asked for.
        """
        found: dict[int, Reply] = {}
        for rows in _alike(chats):
            inputs, out = self._generate([chats[i] for i in rows], **generation)
            new = out.sequences[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(new, skip_special_tokens=True)
            read = inputs["attention_mask"].sum(1).tolist()
            written = self._lengths(new).tolist()
            answers = [Reply(text.strip(), *n) for text, *n in zip(texts, read, written)]
            found.update(zip(rows, answers))
        return [found[i] for i in range(len(chats))]

    def losses(self, chats: Sequence[Chat], texts: Sequence[str]) -> list[tuple[float, bool]]:
        """For each text behind its chat the mean negative log-likelihood in nats per token, and
        whether greedy decoding writes it.

        The texts are decoded, not read with the prompts: so they have no say in which tokens a
        method keeps.

        Raises:
            ValueError: a text without tokens.
        """
        found: dict[int, tuple[float, bool]] = {}
        tokenizer = self.processor.tokenizer
        for rows in _alike(chats):
            chosen = [chats[i] for i in rows]
            ids = []
            for i, chat in zip(rows, chosen):
                prompt = chat_prompt(self.processor, chat)
                start = len(tokenizer(prompt)["input_ids"])
                ids.append(tokenizer(prompt + texts[i])["input_ids"][start:])
            if not all(ids):
                raise ValueError("a continuation without tokens has no likelihood")
            longest = max(map(len, ids))
            padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids]
            _, out = self._generate(
                chosen,
                max_new_tokens=longest,
                do_sample=False,
                output_logits=True,  # not changed by penalties
                forced=padded,
            )
            logits = torch.stack(out.logits, 1).float()
            new = out.sequences[:, -logits.shape[1] :].tolist()
            if any(row != n[: len(row)] for row, n in zip(ids, new)):
                raise UnsupportedError(
                    "the generation settings of the model forbid a token of a continuation; change "
                    "its generation_config"
                )
            for i, row, p in zip(rows, ids, logits.log_softmax(-1)):
                p, target = p[: len(row)], torch.tensor(row, device=p.device)
                greedy = bool((p.argmax(-1) == target).all())
                found[i] = -p.gather(1, target[:, None]).mean().item(), greedy
        return [found[i] for i in range(len(chats))]

    def inputs(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        """Arguments of the model for a left-padded batch, on its device."""
        prompts = [chat_prompt(self.processor, chat) for chat in chats]
        images = [[load_image(image) for image in images_of(chat)] for chat in chats]
        start = self.processor.tokenizer.bos_token  # some templates write it, the tokenizer too
        inputs = self.processor(
            text=prompts,
            images=images if any(images) else None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not (start and prompts[0].startswith(start)),
        )
        return dict(inputs.to(self.model.device, self.model.dtype))

    @torch.no_grad()
    def _generate(
        self, chats: list[Chat], forced: list[list[int]] | None = None, **generation: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """One batch of prompts, all with images or all without: (inputs, what `generate` gives).

        Args:
            forced: the new tokens of each row, if they are not the model's to choose.
        """
        inputs = self.inputs(chats)
        width = inputs["input_ids"].shape[1]
        if forced is not None:
            generation["prefix_allowed_tokens_fn"] = lambda row, ids: [
                forced[row][len(ids) - width]
            ]
        first = FirstLogits(self.model.device)
        synchronize(self.model.device)
        start = time.perf_counter()
        out = self.model.generate(
            **inputs, **generation, logits_processor=[first], return_dict_in_generate=True
        )
        synchronize(self.model.device)
        seconds = time.perf_counter() - start
        new = out.sequences[:, width:]
        if len(new) != len(chats):
            raise ValueError("one answer for each prompt: leave num_return_sequences at 1")
        self.facts.append(
            BatchStats(
                samples=len(chats),
                seconds=seconds,
                first=first.time - start,
                steps=new.shape[1] - 1,
                tokens=int(self._lengths(new).sum()) if forced is None else 0,
                report=self._report() if images_of(chats[0]) else None,
            )
        )
        return inputs, out

    def _lengths(self, new: Tensor) -> Tensor:
        """(B,) tokens of each answer in (B, T), up to its end."""
        end = self.model.generation_config.eos_token_id
        end = self.processor.tokenizer.eos_token_id if end is None else end
        ends = torch.isin(new, torch.as_tensor(end, device=new.device))
        return torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1])

    def _report(self) -> Report | None:
        """Report of the method on the last batch.

        Raises:
            RuntimeError: the tokens that ran are not those that were asked for.
        """
        if self.session is None:
            return None
        report: Report = self.session.report()
        kept = min(report.final_tokens, report.kv_tokens or 0)  # some act on the cache alone
        if report.asked is not None and abs(kept - report.asked) > 0.5:
            raise RuntimeError(
                f"{report.method} was asked for {report.asked:g} visual tokens and kept {kept:g} "
                f"of {report.visual_tokens:g}: results would carry the wrong label; please report "
                "this as a bug of vtc"
            )
        return report


def _alike(chats: Sequence[Chat]) -> list[list[int]]:
    """Indices of chats with images and without: processors take no batch of both."""
    shown = [bool(images_of(chat)) for chat in chats]
    rows = [[i for i, s in enumerate(shown) if s is flag] for flag in (True, False)]
    return [part for part in rows if part]


def summarize(facts: Sequence[BatchStats]) -> dict[str, float]:
    """Times, and means over the samples of what the reports say.

    ``ttft``: seconds to the first logits of a batch, median over batches; ``tpot``: seconds for
    each further step. Shares are of the same prompts without compression; bytes for each sample.
    """
    out = {"ttft": statistics.median(f.first for f in facts)}
    steps = sum(f.steps for f in facts)
    if steps:
        out["tpot"] = sum(f.seconds - f.first for f in facts) / steps
    reported = [(f.samples, f.report) for f in facts if f.report is not None]
    total = sum(n for n, _ in reported)
    if not total:
        return out

    def mean(name: str) -> float:
        return sum(n * getattr(r, name) for n, r in reported) / total

    for name, source in (
        ("visual_tokens", "visual_tokens"),
        ("final_tokens", "final_tokens"),
        ("tokens_per_layer", "average_tokens"),
        ("kv_tokens", "kv_tokens"),
    ):
        out[name] = mean(source)
    out["flops_share"] = mean("flops") / mean("flops_full")
    out["flops_all_share"] = mean("flops_all") / mean("flops_all_full")
    # Bytes are of a batch.
    held, full = (sum(getattr(r, k) for _, r in reported) for k in ("kv_bytes", "kv_bytes_full"))
    return {**out, "kv_bytes": held / total, "kv_share": held / full}
