# SPDX-License-Identifier: Apache-2.0
"""Methods of the KV cache and of single layers, against forwards and codecs written by hand."""

from __future__ import annotations

import mini_llava as mini
import pytest
import torch
from naive_in_cache import ROWS, VIDKV, some_tokens

import vtc
from vtc.hooks.attention_rows import take_rows
from vtc.methods.mod import HeuristicMoD
from vtc.methods.prefixkv import PrefixKV
from vtc.methods.zipvl import ZipVL
from vtc.transformers_contract import cache_left, giving


def test_rows_of_a_rotary_table_with_and_without_a_batch() -> None:
    table, index = torch.randn(3, 2, 5, 4), torch.tensor([[0, 3, 3], [2, 1, 4]])
    rows = torch.stack([part[torch.arange(2)[:, None], index] for part in table])
    assert torch.equal(take_rows(table, index), rows)  # M-RoPE: three tables
    assert torch.equal(take_rows(table[0], index), rows[0])
    assert torch.equal(take_rows(table[0, :1], index), table[0, 0][index])
    assert torch.equal(take_rows(table[0, 0], index), table[0, 0][index])


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_the_last_tokens_of_a_compressed_prompt_can_be_taken_back(rows: int) -> None:
    model = mini.build()
    inputs = mini.prompt([1] * rows)
    with vtc.compressing(model, "fastv", keep_tokens=4):
        out = model(**inputs, use_cache=True)
        cache, length = cache_left(out), inputs["input_ids"].shape[1]
        cache.crop(-2)
        assert cache.get_seq_length() == length - 2
        again = model(input_ids=inputs["input_ids"][:, -2:], **giving(model, cache))
    torch.testing.assert_close(again.logits, out.logits[:, -2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [VIDKV, ZipVL(kv="mixed", group=8), ZipVL(tau=0.7), HeuristicMoD(), PrefixKV(scope="all")],
    ids=str,
)
@torch.no_grad()
def test_every_way_of_calling(method: vtc.Method) -> None:
    """Beams and sampling run; a second image and a text turn go on from what is packed."""
    model = vtc.wrap(mini.build(), vtc.chain("random", method))
    inputs = mini.prompt(ROWS, pad="left")
    for how in (dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)):
        out = model.generate(**inputs, **how, max_new_tokens=20)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 20
    vtc.unwrap(model)
    vtc.wrap(model, method)
    one, two = mini.prompt(1, batch=2, seed=1), mini.prompt(1, batch=2, seed=2)
    cache = cache_left(model(**one, use_cache=True))
    seen = one["input_ids"].shape[1]
    for more in (two, {"input_ids": some_tokens(2, 4)}, {"input_ids": some_tokens(2, 1)}):
        seen += more["input_ids"].shape[1]
        more = {**more, "attention_mask": torch.ones(2, seen, dtype=torch.long)}
        out = model(**more, **giving(model, cache), use_cache=True)
        assert torch.isfinite(out.logits).all()
        assert cache.get_seq_length() == seen


@torch.no_grad()
def test_nothing_to_pack_is_stock() -> None:
    """Short prompts stay in the window: no bit changes."""
    model, inputs = mini.build(), mini.prompt(ROWS, pad="left")
    stock = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    vtc.wrap(model, "vidkv")
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), stock)
