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

from ..errors import UnsupportedError
from ..method import Chain, Method
from ..report import Report
from ..wrapping import wrap
from .timing import synchronize

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
class Answer:
    """An answer, and tokens of its prompt (image placeholders included) and of itself."""

    text: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Facts:
    """What one batch took.

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
        self.facts: list[Facts] = []
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def inputs(self, chats: Sequence[Chat]) -> tuple[dict[str, Tensor], list[str]]:
        """What the model takes for a left-padded batch, on its device; and the prompts."""
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
        return dict(inputs.to(self.model.device, self.model.dtype)), prompts

    @torch.no_grad()
    def answer(self, chats: Sequence[Chat], **generation: Any) -> list[Answer]:
        """Answers in the order of the chats; ``generation`` goes to `generate`.

        Raises:
            UnsupportedError: a prompt that the processor or the method cannot take.
            RuntimeError: other numbers of tokens ran than the method was asked for.
        """
        shown = [bool(images_of(chat)) for chat in chats]
        if len(set(shown)) > 1:  # processors take images for all prompts of a batch or for none
            parts: dict[bool, list[Chat]] = {True: [], False: []}
            for chat, flag in zip(chats, shown):
                parts[flag].append(chat)
            answers = {flag: iter(self.answer(part, **generation)) for flag, part in parts.items()}
            return [next(answers[flag]) for flag in shown]
        inputs, _ = self.inputs(chats)
        first = FirstLogits(self.model.device)
        synchronize(self.model.device)
        start = time.perf_counter()
        out = self.model.generate(**inputs, **generation, logits_processor=[first])
        synchronize(self.model.device)
        seconds = time.perf_counter() - start
        if len(out) != len(chats):
            raise ValueError("one answer for each prompt: leave num_return_sequences at 1")
        new = out[:, inputs["input_ids"].shape[1] :]
        ends = torch.isin(new, self._ends())
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1]).tolist()
        read = inputs["attention_mask"].sum(1).tolist()
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        self.facts.append(
            Facts(
                samples=len(chats),
                seconds=seconds,
                first=first.time - start,
                steps=new.shape[1] - 1,
                tokens=sum(lengths),
                report=self._report(shown[0]),
            )
        )
        return [Answer(text.strip(), *n) for text, *n in zip(texts, read, lengths)]

    @torch.no_grad()
    def losses(self, chat: Chat, continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """For each continuation its mean negative log-likelihood in nats per token, and whether
        greedy decoding would write it.

        The prompt runs once; the continuations are decoded behind its cache, so that they have no
        say in which tokens a method keeps.
        """
        inputs, (prompt,) = self.inputs([chat])
        tokenizer = self.processor.tokenizer
        head = tokenizer(prompt)["input_ids"]
        ids = [tokenizer(prompt + text)["input_ids"][len(head) :] for text in continuations]
        if not all(ids):
            raise ValueError("a continuation without tokens has no likelihood")
        synchronize(self.model.device)
        start = time.perf_counter()
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        synchronize(self.model.device)
        first = time.perf_counter() - start
        longest = max(map(len, ids))
        rows = torch.tensor(
            [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids],
            device=self.model.device,
        )
        logits = out.logits[:, -1:].float().expand(len(ids), -1, -1)
        if longest > 1:
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(ids))
            mask = inputs["attention_mask"].repeat(len(ids), 1)
            behind = self.model(
                input_ids=rows[:, :-1],
                attention_mask=torch.cat([mask, torch.ones_like(rows[:, :-1])], 1),
                past_key_values=cache,
            )
            logits = torch.cat([logits, behind.logits.float()], 1)
        log_p = logits.log_softmax(-1)
        synchronize(self.model.device)
        seconds = time.perf_counter() - start
        report = self._report(bool(images_of(chat)))
        self.facts.append(Facts(1, seconds, first, steps=0, tokens=0, report=report))
        found = []
        for row, p in zip(ids, log_p):
            target = torch.tensor(row, device=p.device)
            p = p[: len(row)]
            greedy = bool((p.argmax(-1) == target).all())
            found.append((-p.gather(1, target[:, None]).mean().item(), greedy))
        return found

    def _ends(self) -> Tensor:
        """The ids that end an answer."""
        end = self.model.generation_config.eos_token_id
        end = self.processor.tokenizer.eos_token_id if end is None else end
        return torch.as_tensor(end, device=self.model.device)

    def _report(self, shown: bool) -> Report | None:
        """What the method did to the last batch, None without method or images.

        Raises:
            RuntimeError: the tokens that ran are not those that were asked for.
        """
        if self.session is None or not shown:
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


def summarize(facts: Sequence[Facts]) -> dict[str, float]:
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
