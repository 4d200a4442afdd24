# SPDX-License-Identifier: Apache-2.0
"""``vtc`` as a model of lmms-eval: any model that vtc wraps, with any method, or without.

Arguments (``--model_args``) are those of `model_args`; the batch size is lmms-eval's own option.
Times and the means of the reports go to the ``throughput`` block of the results, tokens of each
sample to ``token_counts``, from which lmms-eval makes its ``efficiency`` block.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator, chunks
from loguru import logger
from tqdm import tqdm
from transformers import GenerationConfig

from .chat import MAX_NEW_TOKENS, Chat, ChatModel, summarize, user_turn
from .model_args import parse


def generation_of(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's generation_kwargs as arguments of `generate`, and the strings an answer ends at.

    Temperature 0, or none, is greedy. "\\n\\n" is not taken for an end: lmms-eval puts it wherever
    a task names no end, and its own Hugging Face models pass over it too.
    """
    kwargs = dict(given)
    until = kwargs.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    kwargs.setdefault("max_new_tokens", kwargs.pop("max_gen_toks", MAX_NEW_TOKENS))
    temperature = kwargs.get("temperature") or 0
    kwargs["do_sample"] = bool(kwargs.get("do_sample", True) and temperature > 0)
    if not kwargs["do_sample"]:
        kwargs.update(temperature=None, top_p=None, top_k=None)
    known = GenerationConfig()
    unknown = sorted(name for name in kwargs if not hasattr(known, name))
    if unknown:
        logger.warning(f"generation_kwargs that have no effect here: {', '.join(unknown)}")
    kept = {name: value for name, value in kwargs.items() if name not in unknown}
    return kept, [end for end in until if end and end != "\n\n"]


class SimpleVTC(lmms):
    """The simple model, which ``--force_simple`` asks for: multiple choice by likelihood needs it.

    Raises:
        ValueError: an argument that nothing takes, or a value of the wrong type.
        UnsupportedError: the method cannot work on this model; the message says what is missing.
    """

    is_simple = True

    def __init__(self, batch_size: int | str = 1, **arguments: Any) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is a number of prompts, got {batch_size}")
        self.batch_size = int(batch_size)
        loading, method = parse(arguments)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.device = self.accelerator.device
        if self._world_size == 1 and loading.device is not None:
            self.device = torch.device(loading.device)
        if self._world_size > 1 and loading.device_map is not None:
            raise ValueError("device_map spreads one model over devices; start one process for it")
        self.chat = ChatModel(*loading.load(self.device), method)

    # ---- what lmms-eval asks for ---------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; batches hold prompts with the same settings."""
        collator = Collator(
            [request.args for request in requests],
            lambda args: (-len(str(args[0])), str(args[0])),
            group_fn=self._generation,
            grouping=True,
        )
        self.chat.facts.clear()
        results: list[GenerationResult] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="vtc") as bar:
            for batch in collator.get_batched(n=self.batch_size):
                generation, until = generation_of(self._generation(batch[0]))
                answers = self.chat.answer([self._chat(args) for args in batch], **generation)
                for answer in answers:
                    text = answer.text
                    for end in until:
                        text = text.split(end)[0]
                    counts = TokenCounts(answer.input_tokens, answer.output_tokens)
                    results.append(GenerationResult(text, counts))
                bar.update(len(batch))
        self._log()
        return collator.get_original(results)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean negative log-likelihood, whether greedy decoding writes it) of each continuation.

        A loss, not a likelihood: lmms-eval takes the smallest (`Task.process_results`). In a
        `GenerationResult`, as lmms-eval 0.7 makes a string of any other pair
        (`unwrap_generation_output`) and then cannot score it.
        """
        for request in requests:
            if len(request.args) != 6:
                raise NotImplementedError(
                    f"{request.task_name}: acc_mutual_info asks for choices without a prompt, and "
                    "lmms-eval computes it from likelihoods where its models give losses; use acc"
                )
        self.chat.facts.clear()
        results: list[GenerationResult] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="vtc") as bar:
            for batch in chunks(requests, self.batch_size):
                chats, texts = [], []
                for context, choice, visuals, *document in (request.args for request in batch):
                    doc = self._document(*document)
                    chats.append(user_turn(visuals(doc) or [], context))
                    texts.append(choice(doc) if callable(choice) else choice)
                results += [GenerationResult(loss) for loss in self.chat.losses(chats, texts)]
                bar.update(len(batch))
        self._log()
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Not supported."""
        tasks = ", ".join(sorted({request.task_name for request in requests}))
        raise NotImplementedError(
            f"{tasks}: the vtc model answers one prompt at a time, and tasks of type "
            "generate_until_multi_round go on with its answers; leave them out"
        )

    def clean(self) -> None:
        """Free the model before answers are judged."""
        del self.chat
        super().clean()

    # ---- parts ---------------------------------------------------------------------------------

    def _document(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _generation(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """The generation_kwargs among the arguments of a request."""
        return args[1]

    def _chat(self, args: tuple[Any, ...]) -> Chat:
        """The prompt that the arguments of a request describe."""
        context, _, visuals, *document = args
        return user_turn(visuals(self._document(*document)) or [], context)

    def _log(self) -> None:
        """To the ``throughput`` block of the results; of this process, as all models have it."""
        facts = self.chat.facts
        if not facts:
            return
        seconds, tokens = sum(f.seconds for f in facts), sum(f.tokens for f in facts)
        samples = {"total_requests": sum(f.samples for f in facts)}
        log_metrics(seconds, tokens, tokens / seconds, {**samples, **summarize(facts)})


class VTC(SimpleVTC):
    """The chat model, which lmms-eval takes by default: generation from messages."""

    is_simple = False

    def _generation(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return args[2]

    def _chat(self, args: tuple[Any, ...]) -> Chat:
        _, messages, _, *document = args
        return ChatMessages(messages=messages(self._document(*document))).to_hf_messages()
