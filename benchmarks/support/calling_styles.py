# SPDX-License-Identifier: Apache-2.0
"""Calling styles: each is run for a method of every stage on every family, against an oracle.

`outcome` runs one cell of the table in docs/calling-styles.md. tests/engine/test_matrix.py calls it
for all cells, and benchmarks/support/tables.py writes down what it answers, so that no cell says
more than its test.
The oracle is the masked one (benchmarks/support/masked_oracle.py) wherever the style leaves a stock
model to mask; else it is the same method called plainly. Whatever agrees must also differ from the
stock model.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ...engine.refusals import sliding_window
from ...errors import UnsupportedError
from ...method import Chain, Method
from ...methods.divprune import DivPrune
from ...methods.fastv import FastV
from ...methods.mod import HeuristicMoD
from ...methods.pitome import PiToMe
from ...methods.prefixkv import PrefixKV
from ...precompute import compress_inputs
from ...registry import chain
from ...session import compressing
from ...transformers_contract import cache_left, giving
from . import mini_families as mini
from .masked_oracle import compare

METHODS: dict[str, Method | Chain] = {
    "pitome": PiToMe(keep_ratio=0.5),
    "divprune": DivPrune(keep_ratio=0.5),
    "fastv": FastV(keep_ratio=0.5),
    "mod-heuristic": HeuristicMoD(),
    "prefixkv": PrefixKV(keep_ratio=0.5),
    "chain": chain(DivPrune(keep_ratio=0.75), FastV(keep_ratio=0.5), PrefixKV(keep_ratio=0.25)),
}
"""One for each stage, and a chain over three of them."""

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
STEPS = 2
SAID = (7, 8, 9, 10, 11)
UNSAID = [mini.IMAGE, 4, mini.BREAK, mini.END, *mini.TILE_NAMES]
"""Tokens about images, which a trained model would not say, nor take for a draft."""


STOCK = "the stock model of transformers cannot be called this way either"


class OutOfReach(Exception):
    """The stock model cannot be called in this way at all."""


@dataclass
class StyleCell:
    """One method on one family.

    Attributes:
        family, method: keys of `mini_families.EVERY` and `METHODS`.
        style: key of `STYLES`.
    """

    style: str
    method: str
    family: str

    @property
    def model(self) -> Any:
        """The family's mini model, one for all cells; each leaves it as it was."""
        return _model(self.family)

    @property
    def chosen(self) -> Method | Chain:
        return METHODS[self.method]

    @property
    def quiet(self) -> bool:
        """Whether nothing changes before the cache is read."""
        return getattr(self.chosen, "stages", None) == {"cache"}

    def prompt(self, images: list[int], pad: str | None = None, seed: int = 0) -> dict[str, Any]:
        """Prompts with so many images in each row, of the sizes that the family has."""
        sizes = mini.EVERY[self.family].sizes
        rows = [[sizes[(i + r) % 2] for i in range(n)] for r, n in enumerate(images)]
        return mini.prompt(self.family, rows, pad, seed)

    def cache(self) -> dict[str, Any]:
        """A cache of all tokens, where the model's own would cut what the oracle must mask."""
        text = self.model.config.get_text_config()
        return {} if sliding_window(text) is None else giving(self.model, DynamicCache())

    def generate(self, model: Any, inputs: dict[str, Any], **how: Any) -> tuple[Tensor, Tensor]:
        """Tokens and the logits of each step (B, S, V); greedy unless told."""
        torch.manual_seed(3)
        how = {"max_new_tokens": STEPS, "do_sample": False, **self.cache(), **how}
        how |= {"suppress_tokens": UNSAID}
        out = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
        return out.sequences, torch.stack(out.logits, 1)

    def plain(self, inputs: dict[str, Any], **how: Any) -> tuple[Tensor, Tensor]:
        """Tokens and logits of the wrapped model, called plainly."""
        with compressing(self.model, self.chosen):
            return self.generate(self.model, inputs, **how)


@functools.cache
def _model(family: str) -> Any:
    return mini.build(family)


_stock: dict[tuple[str, str], Any] = {}


def stock(cell: StyleCell, run: Callable[[], Any]) -> Any:
    """The same on the model without compression, run once for all methods.

    Raises:
        OutOfReach: it raises there, too.
    """
    key = cell.style, cell.family
    if key not in _stock:
        try:
            _stock[key] = run()
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            _stock[key] = OutOfReach(f"{STOCK}: {type(error).__name__}: {text}")
    if isinstance(_stock[key], OutOfReach):
        raise _stock[key]
    return _stock[key]


def bites(got: Tensor, stock: Tensor, least: float = 1e-3) -> None:
    """Compression changed something, or the comparison proves nothing."""
    same = got.shape == stock.shape and float((got - stock).abs().max()) <= least
    if same:
        raise AssertionError("no teeth: the answer is that of the stock model")


def against_oracle(
    cell: StyleCell,
    run: Callable[[Any], Any],
    model: Any = None,
    quiet: bool = False,
    **close: float,
) -> Any:
    """The run of a wrapped model, compared with the masked oracle and with the stock model.

    Args:
        run: model -> tensors, logits last.
        quiet: whether methods that act on the cache alone have nothing to do in this style.
    """
    model = cell.model if model is None else model
    plain = stock(cell, lambda: run(model))
    with compressing(model, cell.chosen):
        got, want, _ = compare(model, lambda: run(model))
    torch.testing.assert_close(got, want, **(close or CLOSE))
    if quiet and cell.quiet:
        torch.testing.assert_close(got, plain, **(close or CLOSE))
    else:
        bites(got[-1], plain[-1], 2 * close.get("atol", 5e-4))
    return got


# ---- prompts and conversations -----------------------------------------------------------------


def one_prompt(cell: StyleCell) -> None:
    inputs = cell.prompt([1])

    def run(model: Any) -> Any:
        return model(**inputs, use_cache=True, **cell.cache()).logits[:, -1], *cell.generate(
            model, inputs
        )

    against_oracle(cell, run)


def left_padding(cell: StyleCell) -> None:
    inputs = cell.prompt([1, 1], "left")
    against_oracle(cell, lambda model: cell.generate(model, inputs))


def right_padding(cell: StyleCell) -> None:
    inputs = cell.prompt([1, 1], "right")
    against_oracle(cell, lambda model: cell.generate(model, inputs))


def several_images(cell: StyleCell) -> None:
    inputs = cell.prompt([1, 2], "left")
    against_oracle(cell, lambda model: cell.generate(model, inputs))


def second_turn(cell: StyleCell) -> None:
    inputs, words = cell.prompt([1]), torch.tensor([[7, 8, 9, 10]])
    how: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    how |= {"suppress_tokens": UNSAID}
    how |= {"output_logits": True, "return_dict_in_generate": True}

    def run(model: Any) -> tuple[Tensor, Tensor]:
        one = model.generate(**inputs, **how, **cell.cache())
        ids = torch.cat([one.sequences, words], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                room = ids.shape[1] - inputs[name].shape[1]
                given[name] = torch.nn.functional.pad(inputs[name], (0, room))
        two = model.generate(**given, **giving(model, cache_left(one)), **how)
        return two.sequences, torch.stack(one.logits + two.logits, 1)

    against_oracle(cell, run)


# ---- ways of generating ------------------------------------------------------------------------


def beams(cell: StyleCell) -> None:
    inputs = cell.prompt([1, 2], "left")
    how = {"num_beams": 2, "num_return_sequences": 2}
    against_oracle(cell, lambda model: cell.generate(model, inputs, **how))


def sampling(cell: StyleCell) -> None:
    inputs = cell.prompt([1, 1], "left")
    how = {"do_sample": True, "num_return_sequences": 2, "temperature": 2.0, "top_k": 0}
    against_oracle(cell, lambda model: cell.generate(model, inputs, **how))


def assisted(cell: StyleCell) -> None:
    """Drafts of a smaller model; of one row, a limit of transformers."""
    inputs, assistant = cell.prompt([1]), _assistant(cell.family)
    how = {"assistant_model": assistant, "max_new_tokens": 5}
    against_oracle(
        cell,
        lambda model: cell.generate(model, inputs, **how, **giving(model, DynamicCache())),
    )


@functools.cache
def _assistant(family: str) -> Any:
    return mini.build(family, seed=5)


def prompt_lookup(cell: StyleCell) -> None:
    inputs = cell.prompt([1])
    how = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 5}
    against_oracle(
        cell,
        lambda model: cell.generate(model, inputs, **how, **giving(model, DynamicCache())),
    )


def without_cache(cell: StyleCell) -> None:
    """Every step is a prefill, on a prompt that has grown by a token."""
    inputs = cell.prompt([1])
    for step, token in enumerate(SAID[:2]):
        against_oracle(
            StyleCell(f"{cell.style} {step}", cell.method, cell.family),
            partial(_once, inputs=dict(inputs)),
            quiet=True,
        )
        for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                value = {"input_ids": token, "attention_mask": 1}.get(name, 0)
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=value)


def _once(model: Any, inputs: dict[str, Any]) -> tuple[Tensor]:
    return (model(**inputs, use_cache=False).logits[:, -1],)


def embeds(cell: StyleCell) -> None:
    """``inputs_embeds`` beside the pixels: placeholders are known by their embedding."""
    inputs = cell.prompt([1])
    given = {k: v for k, v in inputs.items() if k != "input_ids"}
    given["inputs_embeds"] = cell.model.get_input_embeddings()(inputs["input_ids"]).detach()
    against_oracle(cell, lambda model: cell.generate(model, given))


# ---- caches ------------------------------------------------------------------------------------


def quantized_cache(cell: StyleCell) -> None:
    """Hugging Face's fp8 cache, with one scale for all tensors: else it depends on who is there.

    A rounding may fall to the other side now and then: 1 % of the largest logit is allowed.
    """
    from transformers import QuantizedCache

    inputs, text = cell.prompt([1]), cell.model.config.get_text_config()
    try:
        layer = type(QuantizedCache("fp8", text).layers[0])
    except (ImportError, ValueError, TypeError) as error:
        raise OutOfReach(f"{STOCK}: {error}") from None
    measured = layer._quantize

    def fixed(self: Any, tensor: Tensor, scale: Any = None) -> Any:
        return measured(self, tensor, torch.tensor(0.05))

    def run(model: Any) -> Any:
        return cell.generate(model, inputs, **giving(model, QuantizedCache("fp8", text)))

    with patch.object(layer, "_quantize", fixed):
        logits = stock(cell, lambda: run(cell.model))[1]
        atol = 0.01 * float(logits.abs().max())
        got = against_oracle(cell, run, atol=atol, rtol=0)
    if float((got[1] - cell.plain(inputs)[1]).abs().max()) < 1e-5:
        raise AssertionError("nothing was quantized")


def chunked_prefill(cell: StyleCell) -> None:
    inputs = cell.prompt([1])
    against_oracle(cell, lambda model: cell.generate(model, inputs, prefill_chunk_size=7))


def compressed_inputs(cell: StyleCell) -> None:
    """`compress_inputs`, then a static cache and the stock model."""
    inputs = cell.prompt([1, 1], "left")
    short = compress_inputs(cell.model, inputs, cell.chosen)
    _, got = cell.generate(cell.model, short, cache_implementation="static")
    want = cell.plain(inputs)[1]
    torch.testing.assert_close(got, want, **CLOSE)
    bites(want, stock(cell, lambda: cell.generate(cell.model, inputs))[1])


# ---- precision, wrappers, training -------------------------------------------------------------


class _Force:
    """A logits processor that says what comes next, whatever rounding prefers."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, SAID[ids.shape[1] % len(SAID)]] = 0
        return forced


def bf16(cell: StyleCell) -> None:
    """Within 4 units in the last place of the largest logit: the sums run in another order."""
    model, inputs = _half(cell.family), cell.prompt([1])
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)

    def run(model: Any) -> Any:
        return cell.generate(model, inputs, logits_processor=[_Force()])

    largest = float(stock(cell, lambda: run(model))[1].abs().max())
    unit = torch.finfo(torch.bfloat16).eps * largest
    against_oracle(cell, run, model, atol=4 * unit, rtol=0)


@functools.cache
def _half(family: str) -> Any:
    return copy.deepcopy(_model(family)).to(torch.bfloat16)


def compiled(cell: StyleCell) -> None:
    """``torch.compile(model, fullgraph=True)`` gives the logits of the same model without it."""
    model, inputs = _shallow(cell.family), cell.prompt([1])

    def run() -> Tensor:
        torch._dynamo.reset()
        whole: Any = torch.compile(model, backend="eager", fullgraph=True)
        model(**inputs)  # transformers takes a lock in the first forward, which no graph can hold
        try:
            return whole(**inputs, use_cache=True).logits
        finally:
            torch._dynamo.reset()

    plain = stock(cell, run)
    with compressing(model, cell.chosen):
        want = model(**inputs, use_cache=True).logits
        try:
            got = run()
        except torch._dynamo.exc.TorchDynamoException as error:
            words = re.search(r"UnsupportedError\((['\"])(.*?)\1\)", str(error))
            if words is None:
                raise
            raise UnsupportedError(words[2]) from None
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    if not cell.quiet:
        bites(got, plain)


@functools.cache
def _shallow(family: str) -> Any:
    """Tracing takes long."""
    with (
        patch.dict(mini.TEXT, num_hidden_layers=3),
        patch.dict(mini.VISION, num_hidden_layers=2),
        patch.dict(mini.JOINED, num_hidden_layers=2),
    ):
        return mini.build(family)


def training(cell: StyleCell) -> None:
    """Loss and gradients; the tower gets some."""
    model, inputs = cell.model, cell.prompt([1, 1], "right")
    image = inputs["input_ids"] == mini.IMAGE
    hidden = image | image.roll(1, 1) | (inputs["attention_mask"] == 0)
    labels = inputs["input_ids"].masked_fill(hidden, -100)

    def run(model: Any) -> Any:
        with torch.enable_grad():
            loss = model(**inputs, labels=labels, **cell.cache()).loss
            loss.backward()
        named = model.named_parameters()
        grads = {n: p.grad.clone() for n, p in named if p.grad is not None}
        model.zero_grad()
        return grads, loss.detach(), torch.cat([g.flatten() for g in grads.values()])

    try:
        model.train()
        grads, *_ = against_oracle(cell, run, quiet=True, atol=1e-4, rtol=1e-3)
    finally:
        model.eval()
    seen = [n for n, g in grads.items() if "vision" in n or "visual" in n]
    if not any(float(grads[n].abs().max()) > 1e-6 for n in seen):
        raise AssertionError("no gradient reaches the tower")


def peft(cell: StyleCell) -> None:
    """A LoRA on every query and key of tower and decoder."""
    inputs = cell.prompt([1])
    against_oracle(cell, lambda model: cell.generate(model, inputs), _lora(cell.family))


@functools.cache
def _lora(family: str) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(copy.deepcopy(_model(family)), config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key:
                weight.normal_(0, 0.2)
    return model.eval()


def offloaded(cell: StyleCell) -> None:
    """accelerate moves the weights in for each call; meta devices in between."""
    inputs, model = cell.prompt([1]), _offloaded(cell.family)
    plain = stock(cell, lambda: cell.generate(model, inputs))
    with compressing(model, cell.chosen):
        got = cell.generate(model, inputs)
    torch.testing.assert_close(got, cell.plain(inputs), **CLOSE)
    bites(got[1], plain[1])


@functools.cache
def _offloaded(family: str) -> Any:
    from accelerate import cpu_offload

    model = copy.deepcopy(_model(family))
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


STYLES: dict[str, Callable[[StyleCell], None]] = {
    "one prompt": one_prompt,
    "batch, padded on the left": left_padding,
    "batch, padded on the right": right_padding,
    "several images in a prompt": several_images,
    "second turn on the same cache": second_turn,
    "beams": beams,
    "sampling, several returns": sampling,
    "assisted by a draft model": assisted,
    "prompt lookup": prompt_lookup,
    "`use_cache=False`": without_cache,
    "`inputs_embeds`": embeds,
    "quantized cache (fp8)": quantized_cache,
    "chunked prefill": chunked_prefill,
    "`compress_inputs`, static cache": compressed_inputs,
    "bf16": bf16,
    "`torch.compile(fullgraph=True)`": compiled,
    "training": training,
    "PEFT (LoRA)": peft,
    "CPU offload (accelerate)": offloaded,
}
"""By row of the table, what runs a cell: returns if it agrees with its oracle, raises otherwise."""


@functools.cache
def outcome(style: str, method: str, family: str) -> str | None:
    """None if a cell ran and agreed with its oracle, else the words of its refusal.

    Raises:
        AssertionError: it ran and did not agree.
    """
    try:
        with torch.no_grad():
            STYLES[style](StyleCell(style, method, family))
    except (UnsupportedError, OutOfReach) as error:
        return str(error)
    return None
